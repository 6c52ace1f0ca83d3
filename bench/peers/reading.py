"""Memory itself as a side: one `step` answers the best rate of reading it. What decoding could reach at most."""

from shoal.runtime import read_bytes_per_s


def missing() -> None:
    return None


def build(variant: str) -> "Reading":
    return Reading()


class Reading:
    def step(self, number: int) -> dict[str, float]:
        return {"bytes_per_s": read_bytes_per_s()}

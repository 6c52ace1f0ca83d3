"""Sizes and rates as people write them."""

import re

from shoal.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEAST = 10**4  # without a unit: fewer bytes were hardly meant


def size(text: str) -> int:
    """Bytes of 512MiB, 6GiB, 2GB."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in UNITS:
        raise ConfigError(f"the size {text!r}", "a size like 512MiB or 6GiB", "write it so")
    if not match[2] and 0 < float(match[1]) < LEAST:
        raise ConfigError(f"the size {text!r}, which is bytes", "a unit", f"write {text}MiB or {text}GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def rate(text: str) -> float:
    """Bytes a second of 3GB/s, at least one."""
    amount, slash, second = text.partition("/")
    if slash and second.strip() == "s" and (found := size(amount.strip())):
        return float(found)
    raise ConfigError(f"the rate {text!r}", "a rate like 3GB/s", "write it so")

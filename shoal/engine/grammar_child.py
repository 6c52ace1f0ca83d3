"""Checks and compiles a grammar, inside the child process of `grammar.py`. A vocabulary of bytes is enough for that."""

from llguidance import LLMatcher, LLParserLimits, LLTokenizer


class Bytes:
    is_tokenizer_wrapper = True
    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([b]) for b in range(256)), b"<end>")

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


VOCABULARY = LLTokenizer(Bytes())  # type: ignore[arg-type]


class Refused(Exception):
    pass


def answer(question: dict) -> dict:
    """{} for a grammar that compiles, or {"error": …}."""
    try:
        for schema in question["schemas"]:
            Schema(schema).check()
    except Refused as e:
        return {"error": str(e)}
    matcher = LLMatcher(VOCABULARY, question["lark"], log_level=0, limits=LLParserLimits(**question["limits"]))
    if not matcher.get_error() and not any(matcher.compute_bitmask()):
        return {"error": matcher.get_error() or "no text fits it"}
    return {"error": matcher.get_error()}


class Schema:
    """What neither `schema.py` nor llguidance looks at: whether references come to an end. It may take its time."""

    def __init__(self, root: dict):
        self.root = root
        self.nodes: dict[int, dict] = {}
        waiting: list = [root]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                self.nodes[id(value)] = value
            waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()

    def check(self) -> None:
        """Find what some finite text can satisfy, from the leaves up; the root must be among it."""
        ends: set[int] = set()
        waiting, before = self.nodes, -1
        while len(ends) != before:
            before = len(ends)
            ends |= {key for key, node in waiting.items() if self.can_end(node, ends)}
            waiting = {key: node for key, node in waiting.items() if key not in ends}
        if id(self.root) not in ends:
            raise Refused("references that go in circles, so that no text is ever finished")

    def can_end(self, node: dict, ends: set[int]) -> bool:
        def fine(schema) -> bool:
            return not isinstance(schema, dict) or id(schema) in ends

        properties = node.get("properties")
        must = [*listed(node, "allOf")]
        if isinstance(properties, dict):
            must += [properties.get(name) for name in listed(node, "required") if isinstance(name, str)]
        if node.get("minItems") not in (None, 0):
            must += [node.get("items"), *listed(node, "prefixItems")]
        if isinstance(node.get("$ref"), str):
            must.append(self.target(node["$ref"]))
        choices = [options for key in ("anyOf", "oneOf") if (options := listed(node, key))]
        return all(map(fine, must)) and all(any(map(fine, options)) for options in choices)

    def target(self, reference: str):
        """What a reference points to, by JSON pointer: it leads somewhere, or it wouldn't have come here."""
        value = self.root
        for step in reference.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            value = value[int(name)] if isinstance(value, list) else value[name]
        return value


def listed(node: dict, key: str) -> list:
    """The value of a keyword where it is a list (llguidance says what is wrong with it otherwise)."""
    value = node.get(key)
    return value if isinstance(value, list) else []

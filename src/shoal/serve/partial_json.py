"""JSON objects that arrive piece by piece: passed on only as far as they can still become JSON, and closed wherever they end."""

from __future__ import annotations

NUMBER_STATES = {
    # state -> what may follow (class of the character) -> next state
    "-": {"0": "0", "9": "int"},
    "0": {".": ".", "e": "e"},
    "int": {"0": "int", "9": "int", ".": ".", "e": "e"},
    ".": {"0": "frac", "9": "frac"},
    "frac": {"0": "frac", "9": "frac", "e": "e"},
    "e": {"+": "e+", "-": "e+", "0": "exp", "9": "exp"},
    "e+": {"0": "exp", "9": "exp"},
    "exp": {"0": "exp", "9": "exp"},
}
WHOLE_NUMBERS = {"0", "int", "frac", "exp"}
SPACE = " \t\r\n"
LITERALS = {"t": "true", "f": "false", "n": "null"}


class PartialObject:
    """Reads one JSON object. Text before it is skipped, text after it ignored.

    `push` gives the part that can be passed on. Once a character cannot belong to JSON, the object is closed before it, and
    the rest is ignored: `push` and `finish` together are a valid JSON object whatever comes.
    """

    def __init__(self) -> None:
        self._stack: list[str] = []
        """Of `{` and `[`, the open ones."""
        self._expects = "start"
        """What comes next: `start`, `key or }`, `key`, `:`, `value`, `value or ]`, `, or close`, `end`, or the rest of a `string`,
        `key string`, `escape`, `hex`, `number`, `literal`."""
        self._string = "string"
        """Which of the two an escape belongs to."""
        self._hex = 0
        self._number = ""
        self._literal = ""

    @property
    def complete(self) -> bool:
        return self._expects == "end"

    def push(self, text: str) -> str:
        """The part of `text` that belongs to the object."""
        kept: list[str] = []
        for character in text:
            if self._expects == "end":
                break
            if self._expects == "start" and character != "{":
                continue
            if not self._accept(character):
                kept.append(self.finish())
                break
            kept.append(character)
        return "".join(kept)

    def finish(self) -> str:
        """What closes the object here."""
        if self._expects == "end":
            return ""
        closing = ""
        if self._expects == "start":
            closing, self._stack = "{", ["{"]
        elif self._expects == "escape":
            closing = "\\"
            self._expects = self._string
        elif self._expects == "hex":
            closing = "0" * self._hex
            self._expects = self._string
        if self._expects in ("string", "key string"):
            closing += '"' if self._expects == "string" else '":null'
        elif self._expects == "number" and self._number not in WHOLE_NUMBERS:
            closing += "0"
        elif self._expects == "literal":
            closing += self._literal
        elif self._expects in (":", "value"):
            closing += ":null" if self._expects == ":" else "null"
        elif self._expects == "key":
            closing += '"":null'
        self._expects = "end"
        return closing + "".join("}" if opened == "{" else "]" for opened in reversed(self._stack))

    def _accept(self, character: str) -> bool:
        """Move on by one character; False where it cannot stand here."""
        expects = self._expects
        if expects in ("string", "key string"):
            if character == "\\":
                self._string, self._expects = expects, "escape"
            elif character == '"':
                self._expects = ", or close" if expects == "string" else ":"
            return character >= " "
        if expects == "escape":
            if character not in '"\\/bfnrtu':
                return False
            self._expects = "hex" if character == "u" else self._string
            self._hex = 4
            return True
        if expects == "hex":
            self._hex -= 1
            if not self._hex:
                self._expects = self._string
            if character not in "0123456789abcdefABCDEF":
                self._hex += 1
                self._expects = "hex"
                return False
            return True
        if expects == "literal":
            if not self._literal.startswith(character):
                return False
            self._literal = self._literal[1:]
            self._expects = "literal" if self._literal else ", or close"
            return True
        if expects == "number":
            kind = "e" if character in "eE" else "9" if character in "123456789" else character
            following = NUMBER_STATES[self._number].get(kind)
            if following is not None:
                self._number = following
                return True
            if self._number not in WHOLE_NUMBERS:
                return False
            self._expects = ", or close"
        if character in SPACE:
            return True
        return self._accept_structure(character)

    def _accept_structure(self, character: str) -> bool:
        expects = self._expects
        if expects == "start":
            self._open("{")
        elif expects in ("key", "key or }") and character == '"':
            self._expects = "key string"
        elif expects == ":" and character == ":":
            self._expects = "value"
        elif expects == ", or close" and character == ",":
            self._expects = "key" if self._stack[-1] == "{" else "value"
        elif (character == "}" and expects in ("key or }", ", or close") and self._stack[-1] == "{") or (
            character == "]" and expects in ("value or ]", ", or close") and self._stack[-1] == "["
        ):
            self._stack.pop()
            self._expects = ", or close" if self._stack else "end"
        elif expects in ("value", "value or ]"):
            return self._accept_value(character)
        else:
            return False
        return True

    def _accept_value(self, character: str) -> bool:
        if character in "{[":
            self._open(character)
        elif character == '"':
            self._expects = "string"
        elif character in LITERALS:
            self._expects, self._literal = "literal", LITERALS[character][1:]
        elif character in "-0123456789":
            self._expects, self._number = "number", character if character in "-0" else "int"
        else:
            return False
        return True

    def _open(self, bracket: str) -> None:
        self._stack.append(bracket)
        self._expects = "key or }" if bracket == "{" else "value or ]"

"""Shell scripts as commands and their words, without running anything: what a script itself sets is filled in.

A variable is known where the script sets it once, outside of any branch, loop, function or subshell, to a text that is
known. Whatever else a word takes from outside stays in it with its ``$``, and whoever reads it says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poise.util.errors import OptionError

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_ASSIGNED = re.compile(rf"({_NAME})(\[[^\]]*\])?(\+?)=(.*)", re.DOTALL)
_HERE = re.compile(r"<<(-?)[ \t]*(['\"]?)([A-Za-z_]\w*)\2")
_USED = re.compile(rf"\$(?:(?P<plain>{_NAME})|\{{(?P<name>{_NAME})(?P<all>\[[@*]\])?(?::?-(?P<default>[^}}$`]*))?\}})")
_OPENS = ("if", "for", "while", "until", "case", "select", "{")
_CLOSES = ("fi", "done", "esac", "}")
_BETWEEN = ("then", "do", "else", "elif", "!", "time")
_KEYWORDS = {*_OPENS, *_CLOSES, *_BETWEEN, "function"} - {"for", "select"}
_DECLARES = ("export", "local", "declare", "readonly", "typeset")
_SETS = ("read", "for", "select", "mapfile", "readarray", "unset", "getopts", "let")
_PLAIN = re.compile(r"[^\s;&|()<>'\"`\\$#=]+")
MOST_HERE = 64
DEEPEST = 32
LONGEST = 1 << 13
MOST = 1 << 22


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a command. ``many`` : what stands for ``$`` in it may be no word at all, or several."""

    text: str
    many: bool = False


Known = Mapping[str, str | tuple[Word, ...]]


@dataclass(frozen=True, slots=True)
class Command:
    """Words as written, quotes and all. ``inside`` : it runs under a condition, in a loop, a function or a subshell."""

    words: tuple[str, ...]
    inside: bool


class _Splitter:
    """A script from its beginning, a character or a quotation at a time."""

    def __init__(self, text: str, *, nested: bool = False) -> None:
        self.nested, self.looked = nested, 0
        self.text = text.replace("\r\n", "\n")
        self.out: list[Command] = []
        self.words: list[str] = []
        self.word: list[str] = []
        self.target = False  # the next word is where something is redirected to
        self.blocks = self.brackets = 0
        self.joined = False  # to the command before, by && or || or |
        self.here: list[tuple[str, bool]] = []

    def read(self) -> list[Command]:
        at, text = 0, self.text
        while at < len(text):
            at = self._step(at)
        self._end_command("\n")
        return self.out

    def _step(self, at: int) -> int:
        text, one = self.text, self.text[at]
        if one in "'\"`" or text.startswith(("$(", "${", "$'"), at):
            return self._take(at, _closed(text, at))
        if one == "\\":
            return at + 2 if text.startswith("\n", at + 1) else self._take(at, at + 2)
        if one == "#" and not self.word:
            end = text.find("\n", at)
            return len(text) if end < 0 else end
        if one == "(" and self.word[-1:] == ["="] and _ASSIGNED.fullmatch("".join(self.word)):
            return self._take(at, _closed(text, at))
        if one == "<" and (found := _HERE.match(text, at)):
            self.here.append((found[3], bool(found[1])))
            self._end_word()
            return found.end()
        if found := re.compile(r"&>+|[<>]+&?").match(text, at):
            if "".join(self.word).isdigit():  # 2>file
                self.word = []
            self._end_word()
            self.target = True
            return found.end()
        if found := re.compile(r"&&|\|[|&]?|[\n;&()]").match(text, at):
            self._end_command(found[0])
            return self._after_here(found.end()) if one == "\n" else found.end()
        if one.isspace():
            self._end_word()
            return at + 1
        found = _PLAIN.match(text, at)
        return self._take(at, found.end() if found else at + 1)

    def _take(self, at: int, stop: int) -> int:
        self.word.append(self.text[at:stop])
        return stop

    def _end_word(self) -> None:
        if self.word and not self.target:
            self.words.append("".join(self.word))
        self.target = self.target and not self.word
        self.word = []

    def _end_command(self, by: str) -> None:
        self._end_word()
        self.target = False
        if words := self.words:
            head = next((one for one in words if one not in _BETWEEN), "")
            opens = head in _OPENS or (words[-1] == "{" and head == "function")
            self.blocks += opens
            inside = self.blocks > 0 or self.brackets > 0 or self.joined or by == "|"
            self.out.append(Command(tuple(words), inside))
            self.blocks -= head in _CLOSES and self.blocks > 0
        self.words = []
        self.joined = by in ("&&", "||", "|", "|&") or (self.joined and by == "\n" and not words)
        self.brackets = max(self.brackets + {"(": 1, ")": -1}.get(by, 0), 0)

    def _after_here(self, at: int) -> int:
        """The place after here-documents. What is in one may be a script: its commands count as those of a branch."""
        text = self.text
        for mark, tabs in self.here:
            blank = "[ \\t]*"
            last = rf"^{blank if tabs else ''}{re.escape(mark)}{blank}$"
            self.looked += 1
            end = re.search(last, text[at:], re.MULTILINE) if self.looked <= MOST_HERE else None
            if end is None:  # no here-document: a shift of bits
                continue
            try:
                body = "" if self.nested else text[at : at + end.start()]
                self.out += [Command(one.words, True) for one in _Splitter(body, nested=True).read()]
            except OptionError:
                pass  # no script
            at += end.end()
        self.here = []
        return at


def commands(text: str) -> list[Command]:
    """The simple commands of a script in their order.

    Raises
    ------
    OptionError : a quotation or a bracket that is not closed.
    """
    return _Splitter(text).read()


def known_names(every: Sequence[Command]) -> dict[str, str | tuple[Word, ...]]:
    """What the script sets once and for all: texts, and arrays as words."""
    known: dict[str, str | tuple[Word, ...]] = {}
    doubtful: set[str] = set()
    total = 0
    for command in every:
        words = bare(command.words)
        if words and (words[0] in _SETS or words[:2] == ("printf", "-v")):
            doubtful.update(re.findall(_NAME, " ".join(words[1:])))
        elif words and words[0] in ("source", "."):
            doubtful.update(known)  # it may set them again
        elif words and (words[0] in _DECLARES or all(_ASSIGNED.fullmatch(word) for word in words)):
            for found in filter(None, (_ASSIGNED.fullmatch(word) for word in words)):
                name, value = found[1], _held(found[4], known)
                total += len(value) if isinstance(value, str) else sum(len(one.text) + 1 for one in value)
                if total > MOST:
                    raise OptionError(f"variables of the recipe hold more than {MOST} characters")
                if command.inside or found[2] or found[3] or known.get(name, value) != value:
                    doubtful.add(name)
                known[name] = value
        for name in doubtful & known.keys():
            del known[name]
    return known


def _held(value: str, known: Known) -> str | tuple[Word, ...]:
    if value.startswith("("):
        return tuple(one for part in commands(value[1:-1]) for raw in part.words for one in expand(raw, known))
    return " ".join(one.text for one in expand(value, known, split=False))


def bare(words: tuple[str, ...]) -> tuple[str, ...]:
    """Words from where the command itself begins."""
    at = 0
    while at < len(words) and words[at] in _KEYWORDS:
        at += 1
    return words[at:]


def assignments(words: tuple[str, ...], known: Known) -> tuple[dict[str, str], tuple[str, ...]]:
    """Variables set before a command for it alone, and the command."""
    own: dict[str, str] = {}
    at = 0
    while at < len(words) and (found := _ASSIGNED.fullmatch(words[at])):
        value = _held(found[4], known)
        own[found[1]] = value if isinstance(value, str) else " ".join(one.text for one in value)
        at += 1
    return own, words[at:]


def expand(raw: str, known: Known, *, split: bool = True) -> list[Word]:
    """A written word as the words that it stands for.

    Raises
    ------
    OptionError : a quotation that is not closed, or one word of more than :data:`LONGEST` characters by its variables.
    """
    return _Unfolding(known, split).of(raw)


class _Unfolding:
    def __init__(self, known: Known, split: bool) -> None:
        self.known, self.split = known, split
        self.out: list[Word] = []
        self.parts: list[str] = []
        self.many, self.begun, self.size = False, False, 0

    def of(self, raw: str) -> list[Word]:
        at = 0
        while at < len(raw):
            one = raw[at]
            if one == "'" or raw.startswith("$'", at):
                stop = _closed(raw, at)
                self._add(raw[at + 1 + (one == "$") : stop - 1])
                at = stop
            elif one == '"':
                stop = _closed(raw, at)
                self._inner(raw[at + 1 : stop - 1])
                at = stop
            elif one == "\\":
                self._add(raw[at + 1 : at + 2])
                at += 2
            elif one == "`" or _begins(raw, at):
                at = self._variable(raw, at, False)
            else:
                self._add(one)
                at += 1
        self._end()
        return self.out

    def _inner(self, text: str) -> None:
        """What stands between double quotes."""
        if not re.fullmatch(r"\$\{\w+\[@\]\}", text):
            self.begun = True
        at = 0
        while at < len(text):
            if text.startswith("\\\n", at):
                at += 2
            elif text[at] == "\\" and text[at + 1 : at + 2] in tuple('$`"\\'):
                self._add(text[at + 1])
                at += 2
            elif text[at] == "`" or _begins(text, at):
                at = self._variable(text, at, True)
            else:
                self._add(text[at])
                at += 1

    def _add(self, text: str, many: bool = False) -> None:
        self.parts.append(text)
        self.begun, self.many = True, self.many or many

    def _end(self) -> None:
        if self.begun:
            self.out.append(Word("".join(self.parts), self.many))
        self.parts, self.many, self.begun = [], False, False

    def _variable(self, source: str, at: int, quoted: bool) -> int:
        """Put what a variable stands for; the place after it."""
        found = _USED.match(source, at)
        if found:
            stop = found.end()
        else:
            stop = _closed(source, at) if source[at] == "`" or source[at + 1] in "({" else at + 2
        value = self.known.get(found["plain"] or found["name"]) if found else None
        if value is None and found and found["default"] is not None:
            value = found["default"].strip("\"'")
        if value is None:
            shown = f"$({source[at + 1 : stop - 1]})" if source[at] == "`" else source[at:stop]
            self._add(shown, not quoted or "@" in shown)
        elif isinstance(value, str):
            self._count(len(value))
            self._put(value, quoted or not self.split)
        elif found and found["all"] == "[@]":
            for number, one in enumerate(value):
                if number:
                    self._end()
                self._count(len(one.text) + 1)
                if quoted or not self.split:
                    self._add(one.text, one.many)
                else:
                    self._put(one.text, False)
        else:  # "${X[*]}" is one word of all, $X the first
            shown = (
                " ".join(one.text for one in value)
                if found and found["all"]
                else "".join(one.text for one in value[:1])
            )
            self._count(len(shown))
            self._put(shown, quoted or not self.split)
        return stop

    def _count(self, more: int) -> None:
        self.size += more
        if self.size > LONGEST:
            raise OptionError(f"a word of the recipe stands for more than {LONGEST} characters")

    def _put(self, value: str, whole: bool) -> None:
        if whole or "$(" in value or "`" in value:
            self._add(value, not whole)
            return
        for part in re.split(r"(\s+)", value):
            if part.isspace():
                self._end()
            elif part:
                self._add(part, "$" in part)


def _begins(text: str, at: int) -> bool:
    return text[at] == "$" and re.match(r"\$[\w({@*#?!$-]", text[at : at + 2]) is not None


def _closed(text: str, at: int, depth: int = 0) -> int:
    """The place after what is opened at a place: a quotation, ``$(``, ``${`` or a bracket."""
    if depth > DEEPEST:
        raise OptionError(f"a command of the recipe has more than {DEEPEST} quotations within each other")
    begin = at
    if text[at] == "$":
        at += 1
    kind = text[at]
    end = {"(": ")", "{": "}"}.get(kind, kind)
    plain = kind == "'" and begin == at
    at += 1
    while at < len(text):
        one = text[at]
        if one == end:
            return at + 1
        if one == "\\" and not plain:
            at += 2
        elif kind == "(" and one == "#" and text[at - 1].isspace():
            at = max(text.find("\n", at), at + 1)
        elif kind in '({"' and text.startswith(("$(", "${"), at):
            at = _closed(text, at, depth + 1)
        elif (kind in "({" and one in "'\"`") or (kind == "(" and one == "(") or (kind == '"' and one == "`"):
            at = _closed(text, at, depth + 1)
        else:
            at += 1
    line = text.count("\n", 0, begin) + 1
    raise OptionError(
        f"a command of the recipe cannot be read: {text[begin : begin + 2]} of its line {line} is not closed"
    )

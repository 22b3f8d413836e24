"""Prompt files: JSON, JSONL, CSV or Parquet in, a stream of `Prompt`s out.

An entry, here as a line of JSONL:

    {"id": "prompt_0001", "prompt": "Does CVE-2021-44228 exist?", "category": "cve_existence",
     "is_synthetic_probe": false, "gold_label": {"exists": true, "description": "Log4Shell"},
     "gold_refs": ["CVE-2021-44228"], "original_id": "cve-1", "language": "en"}

`id` and one of `prompt` (text) and `messages` ([{"role": ..., "content": ...}], the last one the user's)
are required. The other fields above may be absent or null. Any further one, such as `language`, is
kept as it came. `prompt_id` and `prompt_category` are read as `id` and `category`, so that exported
results can be asked again. An integer as `id`, `category` or `original_id` counts as its decimal text.

There are no generated ids. Results are joined on the id, and a number by position would mean another
prompt as soon as a line moves: an entry without an id is refused.

The extension decides the format:

- `.json`: `{"metadata": ..., "prompts": [...]}` or a bare list. It is read whole; the others are streamed.
- `.jsonl`, `.ndjson`: one object a line; blank lines are skipped.
- `.csv`: comma-separated, with a header. An empty cell is an absent field. `messages` and `gold_refs` hold
  JSON, `gold_label` JSON or bare text, `is_synthetic_probe` true, false, 1 or 0.
- `.parquet`: values as they are; null is an absent field, and those four columns may hold what they hold
  in CSV. Columns of dates, times, decimals and bytes become text.

Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hallubench.errors import PromptError
from hallubench.text import printable
from hallubench.text_file import LineError, read_csv, read_lines
from hallubench.types import Message, Prompt

Entry: TypeAlias = dict[str, Any]

MAX_NESTING = 500
"""Levels of lists and objects. Well inside Python's recursion limit, so that what was read can be written."""

_FIELDS = {
    "id",
    "prompt",
    "messages",
    "category",
    "is_synthetic_probe",
    "gold_label",
    "gold_refs",
    "original_id",
}
_ALIASES = {"prompt_id": "id", "prompt_category": "category"}


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file, or the first `limit` of them.

    It can be iterated any number of times, from several threads too: each iteration streams the file
    anew. Each checks every prompt that it passes and, at the end, that no id came twice.

    Raises:
        PromptError: (while iterating) the file cannot be read, is empty, or holds what cannot be asked.
    """

    path: Path
    limit: int | None = None

    def __iter__(self) -> Iterator[Prompt]:
        hashes = array("q")
        append = hashes.append
        for _, prompt in self._numbered():
            append(hash(prompt.id))
            yield prompt
        if not hashes:
            raise _error(self.path, "holds no prompts: add some")
        if suspects := _repeated(hashes):
            self._refuse_duplicates(suspects)

    def facts(self) -> dict[str, str]:
        """What names the file in a record: `path`, and `sha256` of all its bytes, also under a limit.

        Raises:
            PromptError: the file cannot be read.
        """
        with _reading(self.path), self.path.open("rb") as file:
            return {"path": str(self.path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def _numbered(self) -> Iterator[tuple[int, Prompt]]:
        """The prompts, each with the number of its line, row or entry."""
        with _reading(self.path):
            unit, read, to_entry = _find_format(self.path)
            number = 0
            try:
                for index, (number, record) in enumerate(islice(read(self.path), self.limit)):
                    yield number, _to_prompt(to_entry(record), index)
            except _EntryError as problem:
                raise _error(self.path, f"{unit} {number}: {problem}") from None

    def _refuse_duplicates(self, suspects: set[int]) -> None:
        """Compare the ids behind equal hashes: different ids may share one."""
        unit = _find_format(self.path).unit
        seen: dict[str, int] = {}
        for number, prompt in self._numbered():
            if hash(prompt.id) in suspects and (first := seen.setdefault(prompt.id, number)) != number:
                raise _error(
                    self.path,
                    f"{unit} {number}: the id {_quoted(prompt.id)} is also that of {unit} {first}: "
                    "give each prompt its own",
                )


def _repeated(hashes: array[int]) -> set[int]:
    """Values that occur more than once. Sorted: 8 bytes a prompt, where a set takes ten times that."""
    values = pa.Array.from_buffers(pa.int64(), len(hashes), [None, pa.py_buffer(hashes)])
    ordered = values.take(pc.array_sort_indices(values))
    return set(ordered[1:].filter(pc.equal(ordered[1:], ordered[:-1])).to_pylist())


# Formats: a file is read as numbered records, and a record becomes an entry.


class _Format(NamedTuple):
    unit: str
    """What messages call a record."""
    read: Callable[[Path], Iterable[tuple[int, Any]]]
    """Yields (number from 1, record). Raises PromptError, or OSError."""
    to_entry: Callable[[Any], Entry]
    """Raises _EntryError."""


class _EntryError(ValueError):
    """What is wrong with one entry, and the fix. The caller knows the file and the place."""


def _find_format(path: Path) -> _Format:
    if not path.exists():
        raise _error(path, f"no such file: {_nearest(path)}")
    if not path.is_file():
        raise _error(path, "is not a file: name the prompts file itself")
    if path.suffix.lower() not in _FORMATS:
        raise _error(path, f"unknown format: the name must end in {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix.lower()]


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {printable(path.parent)}"
    siblings = [sibling.name for sibling in path.parent.iterdir()]
    if similar := difflib.get_close_matches(path.name, siblings, n=1):
        return f"did you mean {printable(path.parent / similar[0])}?"
    return "check the path"


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        document = _decode_json("".join(line for _, line in read_lines(path)))
    except _EntryError as problem:
        raise _error(path, str(problem)) from None
    entries = document.get("prompts") if isinstance(document, dict) else document
    if not isinstance(entries, list):
        found = f"the keys {_listed(document)}" if isinstance(document, dict) else _kind(document)
        raise _error(path, f'no list of prompts but {found}: write {{"prompts": [...]}} or a bare list')
    yield from enumerate(entries, start=1)


def _entry_of_value(value: Any) -> Entry:
    entry = _require_object(value)
    _refuse_deep_nesting(entry)
    _refuse_surrogates(entry)
    return entry


def _read_jsonl(path: Path) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in read_lines(path) if line and not line.isspace())


def _entry_of_line(line: str) -> Entry:
    return _require_object(_parse_json(line.rstrip()))


def _read_csv(path: Path) -> Iterator[tuple[int, Entry]]:
    return read_csv(path, partial(_require_columns, path))


def _read_parquet(path: Path) -> Iterator[tuple[int, Entry]]:
    number = 0
    try:
        # buffer_size: a column chunk is read piece by piece, not whole.
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            _require_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256):
                columns = [_textual(column) for column in batch.columns]
                rows = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
                for row in rows.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield number, {column: value for column, value in row.items() if value is not None}
    except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:
        problem = f"not readable as Parquet after row {number} ({printable(error, 100)}): write the file anew"
        raise _error(path, problem) from None


def _textual(column: pa.Array) -> pa.Array:
    """The column as text if its values have no form in JSON but a usual one in text."""
    types = pa.types
    tests = (
        types.is_timestamp,
        types.is_date,
        types.is_time,
        types.is_decimal,
        types.is_binary,
        types.is_large_binary,
    )
    return column.cast(pa.string()) if any(test(column.type) for test in tests) else column


def _require_columns(path: Path, names: list[str]) -> None:
    """Refuse a table whose rows could not be entries, once for all of them."""
    if "" in names:
        raise _error(path, f"column {names.index('') + 1} has no name: name it, or leave it out")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise _error(path, f"two columns are named {_quoted(min(repeated))}: rename one")
    if not {"id", "prompt_id"} & set(names) or not {"prompt", "messages"} & set(names):
        raise _error(
            path, f'needs the columns "id" and "prompt" (or "messages"), found {_listed(names)}: add them'
        )


def _entry_of_row(row: Entry) -> Entry:
    for column, value in row.items():
        if not isinstance(value, (str, int)):
            _refuse_foreign(column, value)
    return _entry_of_cells(row)


def _entry_of_cells(cells: Entry) -> Entry:
    """Read the cells whose column holds no text."""
    entry = dict(cells)
    for column, parse in _CELL_PARSERS.items():
        if isinstance(cell := cells.get(column), str):
            try:
                entry[column] = parse(cell)
            except _EntryError as problem:
                raise _EntryError(f'"{column}": {problem}') from None
    flag = cells.get("is_synthetic_probe")
    if flag in (0, 1):
        entry["is_synthetic_probe"] = bool(flag)
    return entry


def _parse_label(cell: str) -> Any:
    try:
        return _parse_json(cell)
    except _EntryError:
        if cell.lstrip().startswith(("{", "[")):
            raise
        return cell


def _parse_flag(cell: str) -> Any:
    return {"true": True, "1": True, "false": False, "0": False}.get(cell.lower(), cell)


# JSON, strictly: what another reader would take differently is refused, not guessed.


def _parse_json(text: str) -> Any:
    value = _decode_json(text)
    # The two walks cost as much as the parsing; most texts can be seen to need neither.
    if len(text) > 2 * MAX_NESTING:
        _refuse_deep_nesting(value)
    if "\\" in text and "\\u" in text:
        _refuse_surrogates(value)
    return value


def _decode_json(text: str) -> Any:
    try:
        if text[:1] == "{":
            value, end = _JSON.raw_decode(text)
            if end == len(text):
                return value
        return _JSON.decode(text)  # with white space around, or in need of its message
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        fix = "an object on each line makes a .jsonl file, one document a .json file"
        fix = fix if error.msg == "Extra data" else "correct it there"
        raise _EntryError(f"malformed JSON at {place} ({error.msg}): {fix}") from None
    except RecursionError:
        raise _EntryError(_NESTED_TOO_DEEP) from None
    except _EntryError:
        raise
    except ValueError:  # Python's own bound on the digits of an integer
        raise _EntryError("a number has too many digits: write it as text") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> Entry:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _EntryError(f"the key {_quoted(twice)} comes twice in one object: keep one")
    return entry


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise _EntryError(f"the number {_quoted(number)} is out of range: write null, or text")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite)


def _refuse_deep_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise _EntryError(_NESTED_TOO_DEEP)


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 30) : error.start + 1]
        raise _EntryError(f"half a surrogate pair in {_quoted(near)}: write the whole character") from None


def _refuse_foreign(column: str, value: Any) -> None:
    """Refuse what Parquet can hold and JSON cannot."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_foreign(column, key if not isinstance(key, str) else item)
    elif isinstance(value, list):
        for item in value:
            _refuse_foreign(column, item)
    elif not (
        value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    ):
        raise _EntryError(
            f"{_quoted(column)} holds {printable(value, 60)}, which JSON cannot: write null, or text"
        )


# Entries: every way into a `Prompt`, whatever the format.


def _to_prompt(entry: Entry, index: int) -> Prompt:
    extra: Entry = {}
    if not _FIELDS.issuperset(entry):
        entry = _rename(entry)
        extra = {key: value for key, value in entry.items() if key not in _FIELDS}
    get = entry.get
    id_, text, messages = get("id"), get("prompt"), get("messages")
    if id_ is None:
        raise _EntryError(
            f'no "id" among {_listed(entry)}: give the prompt one of its own, results are joined on it'
        )
    if text is None and messages is None:
        raise _EntryError(f'neither "prompt" nor "messages" among {_listed(entry)}: write one of them')
    if text is not None and messages is not None:
        raise _EntryError('has both "prompt" and "messages": keep one of them')
    flag, references = get("is_synthetic_probe"), get("gold_refs")
    category, original_id = get("category"), get("original_id")
    if flag is not None and not isinstance(flag, bool):
        raise _wrong_type('"is_synthetic_probe"', flag, "true or false")
    return Prompt(
        id=_require_text('"id"', _name("id", id_)),
        index=index,
        text=None if text is None else _require_text('"prompt"', text),
        messages=None if messages is None else _to_messages(messages),
        category=None if category is None else _name("category", category),
        is_synthetic_probe=flag,
        gold_label=get("gold_label"),
        gold_refs=None if references is None else _to_references(references),
        original_id=None if original_id is None else _name("original_id", original_id),
        extra=extra,
    )


def _rename(entry: Entry) -> Entry:
    for alias, field in _ALIASES.items():
        if alias in entry and field in entry:
            raise _EntryError(f'has both "{field}" and "{alias}", which mean the same: keep one of them')
    return {_ALIASES.get(key, key): value for key, value in entry.items()}


def _require_object(value: Any) -> Entry:
    if not isinstance(value, dict):
        raise _wrong_type("the entry", value, 'an object such as {"id": ..., "prompt": ...}')
    return value


def _require_text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(what, value, "text")
    if not value or value.isspace():
        raise _EntryError(f"{what} is empty: write text, or leave the entry out")
    if "\0" in value:
        raise _EntryError(f"{what} holds a NUL character: remove it")
    return value


def _name(field: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _wrong_type(f'"{field}"', value, "text")


def _to_references(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not set(map(type, value)) <= {str}:
        raise _EntryError('"gold_refs" is not a list of texts: write one such as ["CVE-2021-44228"]')
    return tuple(value)


def _to_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong_type('"messages"', value, 'a list such as [{"role": "user", "content": ...}]')
    turns = tuple(_to_message(turn, position) for position, turn in enumerate(value))
    if turns[-1].role != "user":
        raise _EntryError(f'"messages" ends with the role {turns[-1].role}: the last one must be the user\'s')
    return turns


def _to_message(turn: Any, position: int) -> Message:
    what = f"messages[{position}]"
    if not isinstance(turn, dict):
        raise _wrong_type(what, turn, 'an object such as {"role": "user", "content": ...}')
    role = turn.get("role")
    if role not in ("system", "user", "assistant"):
        raise _wrong_type(f"{what}.role", role, "system, user or assistant")
    if role == "system" and position > 0:
        raise _EntryError(f"{what} is a system message: only the first can be one")
    for key, item in turn.items():
        if key not in ("role", "content") and item is not None:
            raise _EntryError(f"{what} has the key {_quoted(key)}: only role and content can be asked")
    return Message(role, _require_text(f"{what}.content", turn.get("content")))


# What the errors say.


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _error(path, f"cannot be read ({printable(error.strerror or error)}): check the file") from None
    except LineError as problem:
        raise _error(path, str(problem)) from None


def _error(path: Path, problem: str) -> PromptError:
    return PromptError(f"{printable(path)}: {problem}")


def _wrong_type(what: str, value: Any, wanted: str) -> _EntryError:
    return _EntryError(f"{what} is {_kind(value)}: write {wanted}")


def _kind(value: Any) -> str:
    match value:
        case dict():
            return "an object"
        case list():
            return "a list" if value else "an empty list"
        case str():
            return _quoted(value)
        case None:
            return "missing"
        case _:
            return printable(json.dumps(value), 60)


def _quoted(text: str) -> str:
    return f'"{printable(text, 60)}"'


def _listed(names: Iterable[str]) -> str:
    """The names, or the first of them."""
    shown = [_quoted(name) for name in islice(names, 8)]
    return ", ".join(shown) or "no keys"


_NESTED_TOO_DEEP = f"nested deeper than {MAX_NESTING} levels: flatten it"
_CELL_PARSERS: dict[str, Callable[[str], Any]] = {
    "messages": _parse_json,
    "gold_refs": _parse_json,
    "gold_label": _parse_label,
    "is_synthetic_probe": _parse_flag,
}
_FORMATS = {
    ".json": _Format("entry", _read_json, _entry_of_value),
    ".jsonl": _Format("line", _read_jsonl, _entry_of_line),
    ".ndjson": _Format("line", _read_jsonl, _entry_of_line),
    ".csv": _Format("line", _read_csv, _entry_of_cells),
    ".parquet": _Format("row", _read_parquet, _entry_of_row),
}

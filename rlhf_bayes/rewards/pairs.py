"""Reads preference data from the layouts in which they are published into the one that the trainer takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from datasets import Dataset

from rlhf_bayes.rewards.judgement import check_pairs, parsed_literal

Chat = list[dict[str, Any]]
Text = str | Chat

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
WANTED = "a text, or a list of messages like {'role': 'user', 'content': 'Hi'}"
# names of speakers in the layout of ShareGPT, and in that of tools that write it
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "bot": "assistant", "model": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool",
}  # fmt: skip
# an answer may begin with a prompt of one or two words by chance
_WORDS_BY_CHANCE = 2


def read_pairs(name: str, dataset: Any) -> Any:
    """
    The pairs with texts or chats in `chosen` and `rejected`, and the prompt's part in `prompt` where there is one.

    Other layouts are read too: messages with `from` and `value`; one message instead of a list; chats as JSON or
    Python text, as in CSV files; a text as the prompt of chats; a chat as the prompt of texts; and `chosen` and
    `rejected` that repeat the prompt. A row that is ambiguous is refused.

    Args:
        name (`str`): the dataset's name in errors.
        dataset (`Dataset`, a stream, a mapping of several, or `None`):
            Pairs, as texts or token ids. A stream is read row by row.

    Returns:
        The dataset; the same object if nothing had to be changed.

    Raises:
        `TypeError` or `ValueError`: a row that cannot be read, named with its column, or as [`check_pairs`].
    """
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {key: read_pairs(f"{name}['{key}']", part) for key, part in dataset.items()}
    columns = getattr(dataset, "column_names", None)
    if columns is None or not {"chosen", "rejected"} <= set(columns) or "chosen_ids" in columns:
        check_pairs(name, dataset)
        return dataset
    if isinstance(dataset, Dataset):
        dataset = _read(name, dataset)
        check_pairs(name, dataset)
        return dataset
    reader = _RowReader(name, repeats_prompt=False)
    first = next(iter(dataset), None)
    unchanged = first is None or reader(first, 0) == {}
    return dataset.map(reader, with_indices=True, features=dataset.features if unchanged else None)


def read_pair(row: Mapping[str, Any], where: str) -> dict[str, Text]:
    """
    Prompt (if there is one), chosen and rejected of a row, either all texts or all chats.

    Args:
        row (`Mapping[str, Any]`): a row of the dataset.
        where (`str`): the row's name in errors.

    Raises:
        `TypeError` or `ValueError`: see [`read_pairs`].
    """
    texts = {column: _text(row[column], column, where) for column in TEXT_COLUMNS if column in row}
    chosen, rejected = texts["chosen"], texts["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise TypeError(
            f"`chosen` and `rejected` must both be texts or both be chats, got {_shown(row['chosen'])} and "
            f"{_shown(row['rejected'])} in {where}. Convert one of them, or drop the row."
        )
    if "prompt" not in texts or isinstance(texts["prompt"], str) == isinstance(chosen, str):
        return texts
    if isinstance(chosen, str):
        replies = {column: [{"role": "assistant", "content": texts[column]}] for column in ("chosen", "rejected")}
        return {"prompt": texts["prompt"], **replies}
    return _with_text_as_prompt(texts, where)


def prompt_and_texts(row: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """
    Prompt, chosen and rejected of a row of [`read_pairs`], such that prompt + chosen is what is trained on.

    Without a column `prompt`, the prompt is empty.
    """
    chosen = row["chosen"]
    return row.get("prompt", "" if isinstance(chosen, str) else []), chosen, row["rejected"]


def guessed_prompt(row: Mapping[str, Any]) -> Text:
    """
    The prompt of a row of [`read_pairs`], or a guess at it where there is none.

    The guess is the common beginning of chosen and rejected, up to the end of a turn or of a word. It is empty where
    they have no common beginning.
    """
    if "prompt" in row:
        return row["prompt"]
    chosen, rejected = row["chosen"], row["rejected"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not isinstance(chosen, str):
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)  # both replies keep at least one message or character
        while shared > 0 and chosen[shared - 1]["role"] == "assistant":
            shared -= 1
        return chosen[:shared]
    turn = chosen.rfind("\n\nAssistant:", 0, shared)  # the layout of Anthropic's data
    if turn >= 0:
        return chosen[: turn + len("\n\nAssistant:")]
    while shared > 0 and not (_begins_a_word(chosen[shared:]) and _begins_a_word(rejected[shared:])):
        shared -= 1
    return chosen[:shared]


@final
@dataclass(frozen=True)
class _RowReader:
    """Reads the columns of a row that must be replaced."""

    name: str
    repeats_prompt: bool

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Text]:
        where = f"`{self.name}` row {index}"
        texts = read_pair(row, where)
        if self.repeats_prompt:
            length = len(texts["prompt"])
            texts |= {column: texts[column][length:] for column in ("chosen", "rejected")}
        elif _repeats(texts) == 2 and _is_telling(texts["prompt"]):
            raise _repeated_prompt(where)
        return {column: text for column, text in texts.items() if text != row[column]}


def _read(name: str, dataset: Dataset) -> Dataset:
    rows: Any = dataset.select_columns([column for column in TEXT_COLUMNS if column in dataset.column_names])
    changed, repeating, telling, echoes = False, 0, None, []
    form = str
    for index, row in enumerate(rows):
        where = f"`{name}` row {index}"
        texts = read_pair(row, where)
        if index == 0:
            form = type(texts["chosen"])
        elif type(texts["chosen"]) is not form:
            raise TypeError(
                f"`chosen` must hold texts in all rows or chats in all rows, got {_shown(row['chosen'])} in {where} "
                f"and the other in row 0. Convert one kind, or drop the rows."
            )
        changed = changed or any(text != row[column] for column, text in texts.items())
        repeated = _repeats(texts)
        repeating += repeated == 2
        if repeated and _is_telling(texts["prompt"]):
            if repeated == 2:
                telling = telling or where
            else:
                echoes.append(where)
    repeats = 0 < repeating == len(rows)
    if telling is not None and not repeats:
        raise _repeated_prompt(telling)
    if 2 * len(echoes) > len(rows):  # fewer are answers that say the question again
        raise _repeated_prompt(echoes[0])
    if not (changed or repeats):
        return dataset
    read = dataset.map(
        _RowReaderOfAll(_RowReader(name, repeats)), with_indices=True, remove_columns=rows.column_names,
        desc=f"Reading the layout of {name}",
    )  # fmt: skip
    _check_replies(name, read)
    return read


@final
@dataclass(frozen=True)
class _RowReaderOfAll:
    """Reads all text columns of a row, whose types may change."""

    reader: _RowReader

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Text]:
        return {column: row[column] for column in TEXT_COLUMNS if column in row} | self.reader(row, index)


def _check_replies(name: str, dataset: Dataset) -> None:
    for column in ("chosen", "rejected"):
        for index, text in enumerate(dataset[column]):
            if text == []:
                raise ValueError(
                    f"`{column}` must hold a reply to the prompt, got the prompt alone in `{name}` row {index}. Drop "
                    "the row."
                )


def _text(value: Any, column: str, where: str) -> Text:
    """A cell as a text or as a chat of messages with `role` and `content`."""
    if isinstance(value, str):
        parsed = _parsed_chat(value, column, where)
        return value if parsed is None else parsed
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        hint = "Drop or convert such rows."
        if column == "prompt":
            hint = "Drop or convert such rows; without any prompt, leave the column out."
        raise TypeError(
            f"`{column}` must hold texts or lists of chat messages, got {_shown(value)} in {where}: wanted is "
            f"{WANTED}. {hint}"
        )
    if not value and column != "prompt":
        raise ValueError(f"`{column}` must have at least one message, got an empty list in {where}. Drop the row.")
    return [_message(message, column, where) for message in value]


def _parsed_chat(text: str, column: str, where: str) -> Chat | None:
    """The chat that a text holds as JSON or as a Python list; None for any other text."""
    stripped = text.strip()
    if not stripped.startswith(("[", "{")):
        return None
    parsed = parsed_literal(stripped)
    messages = [parsed] if isinstance(parsed, dict) else parsed
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return [_message(message, column, where) for message in messages]
    head = stripped.lstrip("[{ \n")
    if parsed is None and head.startswith(
        tuple(f"{quote}{key}{quote}" for quote in "'\"" for key in ("role", "from"))
    ):
        raise ValueError(
            f"`{column}` must hold {WANTED}, got text that begins like a list of messages and is not valid JSON in "
            f"{where}: {_shown(text)}. Write the column with `json.dumps`."
        )
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value))


def _message(message: Any, column: str, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"`{column}` must hold {WANTED}, got {_shown(message)} in a list in {where}. Convert it.")
    # `datasets` adds keys that only other rows have to a message, with the value None
    role, content = message.get("role"), message.get("content")
    if role is None and message.get("from") is not None:
        speaker, content = message["from"], message.get("value")
        role = _ROLES.get(str(speaker).lower())
        if role is None:
            raise ValueError(
                f"`from` in `{column}` must be one of {', '.join(_ROLES)}, got {speaker!r} in {where}. Rename "
                "who speaks."
            )
        message = {"role": role, "content": content}
    calls = message.get("tool_calls")
    if not isinstance(role, str) or not (isinstance(content, str | list) or (content is None and calls)):
        raise TypeError(
            f"`{column}` must hold {WANTED}, got the message {_shown(dict(message))} in {where}. Convert it, or drop "
            "the row."
        )
    return dict(message)


def _with_text_as_prompt(texts: dict[str, Any], where: str) -> dict[str, Text]:
    """A pair of chats whose prompt is a text: that of one of their user messages, or the message they reply to."""
    prompt, chosen, rejected = (texts[column] for column in TEXT_COLUMNS)
    if not any(message["role"] == "user" for message in [*chosen, *rejected]):
        return texts | {"prompt": [{"role": "user", "content": prompt}]}
    for length in range(min(len(chosen), len(rejected)) - 1, 0, -1):
        last = chosen[length - 1]
        if last["role"] == "user" and _same(last["content"], prompt) and chosen[:length] == rejected[:length]:
            return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}
    raise ValueError(
        f"`prompt` must be a message that the chats in `chosen` and `rejected` share, or these must hold replies "
        f"only, got the text {_shown(prompt)} in {where}, which neither is. Leave the column `prompt` out where the "
        "chats hold it, or give it as a list of messages."
    )


def _same(content: Any, prompt: str) -> bool:
    return isinstance(content, str) and content.strip() == prompt.strip()


def _repeats(texts: Mapping[str, Any]) -> int:
    """How many of chosen and rejected begin with the prompt."""
    prompt = texts.get("prompt")
    if not prompt:
        return 0
    return sum(texts[column][: len(prompt)] == prompt for column in ("chosen", "rejected"))


def _is_telling(prompt: Text) -> bool:
    return not isinstance(prompt, str) or len(prompt.split()) > _WORDS_BY_CHANCE


def _repeated_prompt(where: str) -> ValueError:
    return ValueError(
        f"`chosen` and `rejected` must begin with `prompt` in all rows or in none, got a text that repeats it in "
        f"{where} and others that do not: the prompt would be read twice. Remove it from the texts, or leave the "
        "column `prompt` out where they hold it."
    )


def _begins_a_word(text: str) -> bool:
    return text[:1].isspace()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""What the two scores of a run are called, and every text about predictive and saliency variance in those words.

The program's texts speak of predictive and of saliency variance. A run that judges other scores (``--scores entropy variance``)
says what they are called in its metrics, under "score_names"; its texts are then worded by them, in this one place: those that
``metrics.json`` holds when they are made, all others when a document is written, a figure saved or a table printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.saved_run import PooledRun, SavedRun

#: Names that arrays of saved maps have, in words.
STANDARD_NAMES = {"pred_variance": "predictive variance", "saliency_variance": "saliency variance"}
#: What the program says, as regular expressions, and what it stands for; a longer text comes before its parts.
WORDS = {
    r"predictive and saliency variance": "{first} and {second}",
    r"predictive variance|predictive(?! entropy)": "{first}",
    r"saliency (?:variance|score)|saliency": "{second}",
    r"variances": "scores",
    r"each variance": "each score",
}
#: What no run of given maps may say, whatever its scores are called.
ALWAYS = {
    r"variance of probability": "{first}",
    r"variance of Grad-CAM": "{second}",
    r"--trainings 10 would tell": "the maps of other trainings, pooled with --pool, would tell",
}
#: The keys of ``metrics.json`` under which texts stand; all other texts there are names, ids and words of the user.
TEXT_KEYS = ("verdict", "verdict_recalibrated", "sentence", "notes", "label", "text")


class Terms:
    """Words texts by the names of the two scores.

    Args:
        first, second: what the score that is judged is called, and the one that may add to it.
        kept: texts that stay as they are although a standard term stands in them: names of files, and what was worded before.

    Example:
        >>> terms = Terms("entropy", "variance")
        >>> terms("AUROC of errors that saliency adds to predictive variance")
        'AUROC of errors that variance adds to entropy'
        >>> terms("Saliency variance, predictive entropy")
        'Variance, predictive entropy'
    """

    def __init__(self, first: str, second: str, kept: Iterable[str] = ()) -> None:
        self.names = {"first": first, "second": second}
        standard = [first, second] == list(STANDARD_NAMES.values())
        patterns = ALWAYS if standard else {**ALWAYS, **WORDS}
        self._worded_by = [word.format(**self.names) for word in patterns.values()]
        self._words = re.compile(
            rf"(?<![\w-])(?:{'|'.join(f'({pattern})' for pattern in patterns)})(?!\w)", re.IGNORECASE
        )
        self._kept: re.Pattern[str] | None = None
        mentions = {text for text in kept if self._words.search(text) and not self._words.fullmatch(text)}
        if mentions:
            longest_first = sorted(mentions, key=lambda text: (-len(text), text))
            # a chart breaks its lines at spaces
            self._kept = re.compile("|".join(r"\s+".join(map(re.escape, text.split())) for text in longest_first))

    def __call__(self, text: str) -> str:
        """The text with the names in place of the standard terms."""
        if self._kept is None:
            return self._words.sub(self._worded, text)
        worded, end = [], 0
        for match in self._kept.finditer(text):
            worded += [self._words.sub(self._worded, text[end:match.start()]), match[0]]
            end = match.end()
        return "".join([*worded, self._words.sub(self._worded, text[end:])])

    def _worded(self, match: re.Match[str]) -> str:
        place = next(index for index, group in enumerate(match.groups()) if group is not None)
        word = self._worded_by[place]
        begins_sentence = match[0][0].isupper() and word.replace(" ", "").isalpha()
        return word[:1].upper() + word[1:] if begins_sentence else word

    def in_metrics(self, content: Any) -> Any:
        """A copy of metrics, or of a part of them, with every text under ``TEXT_KEYS`` in these words."""
        if isinstance(content, Mapping):
            return {
                key: self._all(value) if key in TEXT_KEYS else self.in_metrics(value) for key, value in content.items()
            }
        return [self.in_metrics(item) for item in content] if isinstance(content, (list, tuple)) else content

    def _all(self, content: Any) -> Any:
        if isinstance(content, str):
            return self(content)
        if isinstance(content, Mapping):
            return {key: self._all(value) for key, value in content.items()}
        return [self._all(item) for item in content] if isinstance(content, (list, tuple)) else content


class Standard(Terms):
    """The terms of a run that made its own maps: every text stays as it is."""

    def __init__(self) -> None:
        super().__init__("predictive variance", "saliency variance")

    def __call__(self, text: str) -> str:
        """The text."""
        return text


STANDARD = Standard()


def displayed(names: Sequence[str]) -> dict[str, str]:
    """What the two scores are called, from the names of their arrays: "score_names" of the metrics.

    Example:
        >>> displayed(["entropy", "saliency_variance"])
        {'first': 'entropy', 'second': 'saliency variance'}
    """
    first, second = (STANDARD_NAMES.get(name, name) for name in names)
    return {"first": first, "second": second}


def judges_given_maps(record: Mapping[str, Any]) -> bool:
    """Whether a run, by its ``config.json``, judged maps that something else had made."""
    return "maps" in record


def terms_of_metrics(metrics: Mapping[str, Any], *others: Any) -> Terms:
    """The terms of a run or of a pool.

    Args:
        metrics: what ``metrics.json`` holds.
        others: more that holds texts of the user, which stay as they are.
    """
    names = metrics.get("score_names")
    return STANDARD if names is None else Terms(names["first"], names["second"], _texts([metrics, *others]))


def terms_of(run: SavedRun | PooledRun) -> Terms:
    """The terms of a finished run or of a pool; names of its images, files and folders stay as they are."""
    ids = [row["id"] for row in run.rows] if isinstance(run, SavedRun) else []
    folder = Path(run.folder)
    return terms_of_metrics(run.metrics, run.record, ids, [str(folder), folder.resolve().name])


def _texts(content: Any) -> Iterator[str]:
    """Every text in nested dictionaries and lists, keys apart."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, (list, tuple)):
        for item in content:
            yield from _texts(item)

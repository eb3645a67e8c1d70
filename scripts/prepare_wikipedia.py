"""Turns a MediaWiki XML dump into plain article text, one JSON line (`title`, `text`) per article; standard library only.

Prose is kept, paragraph by paragraph; tables, lists, infoboxes, captions, formulas and footnotes are not. A paragraph in which
something was lost that a reader would miss, or in which markup is left, is dropped: a language model should see sentences
as people wrote them. The output depends on the input alone.
"""

import argparse
import gzip
import html
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

__all__ = ["Counts", "Page", "clean_article", "is_article", "iter_pages", "write_articles"]

MIN_ARTICLE_CHARACTERS = 400
MIN_PARAGRAPH_CHARACTERS = 60

# Where something stood whose absence breaks its sentence (a formula, a bare URL, an unclosed bracket).
HOLE = "\x00"
# Where something stood that a reader does not miss (a footnote, an image, a template).
GONE = "\x01"

NAMESPACES = frozenset(
    f"{name}{suffix}"
    for name in ("category", "help", "image", "mediawiki", "portal", "template", "user", "wikipedia", "talk", "special")
    for suffix in ("", " talk")
)
# Of a link without a leading colon: these place a picture or a category, they are not words of the sentence.
INVISIBLE_LINKS = frozenset({"image", "file", "media", "category"})
# Interwiki links stand in the text but are shown in the margin; language codes are written in lower case.
LANGUAGE = re.compile(r"[a-z]{2,3}|simple|(?:zh|be|roa|map|cbk|fiu|bat|nds)-[a-z-]+|tokipona|dk|minnan")
# Templates whose last argument is a word of the sentence.
TEXT_TEMPLATES = frozenset(
    {
        "ipa",
        "ipa2",
        "unicode",
        "polytonic",
        "lang",
        "ll",
        "arabdin",
        "ar",
        "hayeren",
        "audio",
        "nowrap",
        "sic",
        "rtl-lang",
        "mathvar",
    }
)
# Sections at the end of an article that hold lists and notes, whatever stands in them as sentences.
DROPPED_SECTIONS = re.compile(
    r"bibliography|books|discography|external links?(?: and references)?|filmography|footnotes|further reading|gallery|links|"
    r"notes(?: and references)?|references?(?: and (?:external links|further reading))?|related (?:articles|topics)|see also|"
    r"sources?|timeline|track listing"
)

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_NOWIKI = re.compile(r"<nowiki>(.*?)</nowiki>", re.S | re.I)
_UNSEEN = re.compile(r"<(ref|gallery|timeline|hiero|references|caption)\b[^<>/]*(?:/>|>.*?</\1\s*>)", re.S | re.I)
_FORMULA = re.compile(r"<(math|pre|source)\b[^<>]*>(.*?)</\1\s*>", re.S | re.I)
_PLAIN_FORMULA = re.compile(r"\s*[A-Za-z0-9 +=<>/().,!*-]{1,24}\s*")
_NOTE_MARK = re.compile(r"<sup>\s*\[[^\[\]]*\]\s*</sup>|(?<=[.,;:!?\"'])\s?<sup>\s*\d[\d, ]{0,8}</sup>", re.I)
_EXPONENT = re.compile(r"(?<=[\w)])<sup>([-+\u2212]?\w{1,4}|&minus;\d+)</sup>", re.I)
_ITEM = re.compile(r"<(?:li|dt|dd|tr|td|th)\b[^<>]*>", re.I)
_BLOCK = re.compile(r"</?(?:p|blockquote|center|div|ul|ol|dl|hr|h[1-6])\b[^<>]*>", re.I)
_BREAK = re.compile(r"<\s*/?\s*br\b[^<>]*>", re.I)
_TABLE_TAG = re.compile(r"<(/?table)\b[^<>]*>", re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,300}>")
_BRACKET = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}(?!\})|</?table>")
_CLOSES = {"]]": "[[", "}}": "{{", "|}": "{|", "</table>": "<table>"}
_LABELLED_URL = re.compile(r"\[(?:(?:https?|ftp|irc|news|gopher|telnet)://|mailto:)[^\s\[\]]+ *([^\[\]\n]*)\]")
_BARE_URL = re.compile(r"(?:https?|ftp)://[^\s<>\[\]]+")
_POSSESSIVE = re.compile(r"(?<!')''([^'\n]+)'''s\b")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"(={1,6})\s*(.*?)\s*=+\s*")
_MAGIC = re.compile(r"__[A-Z]+__")
_BLANK = r"\s\x01\u00a0\u2000-\u200a\u202f\u3000"
# Not simply [_BLANK]+, which would replace every single space by itself.
_SPACES = re.compile(rf"(?: (?=[{_BLANK}])|(?! )[{_BLANK}])[{_BLANK}]*")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
_EMPTY_PARENTHESES = re.compile(r" ?[(\[][\s,;:/\u2013\u2014-]*[)\]]")
_OPEN_PUNCTUATION = re.compile(r"\(\s*[,;:]?\s+")
_CLOSE_PUNCTUATION = re.compile(r"\s*[,;:]?\s+\)")
_SPACE_BEFORE = re.compile(r" +([,.;:!?](?:\s|$))")
_DOUBLED_PUNCTUATION = re.compile(r"[,;] ?(?=[,;.](?:\s|$))")
_SENTENCE_END = re.compile(r"[.!?]['\")\]\u201d\u2019]*$")
_LAST_SENTENCE = re.compile(r"[.!?]['\")\]\u201d\u2019]*(?= )")
_LEFT_OVER = re.compile(
    r"[\x00{}|]|\[\[|\]\]|''|</?[A-Za-z]|&#?\w+;|\[(?:https?|ftp|mailto):|\bthumb\b|==|~~~|\b\d+px\b"
)
_REDIRECT = re.compile(r"\s*#\s*redirect", re.I)
_DISAMBIGUATION = re.compile(r"\{\{\s*(?:[\w -]*disambig\w*|[234]l[ac]|surname|tla|hndis)\b", re.I)


class Page(NamedTuple):
    """One page of the dump."""

    title: str
    text: str


class Counts(NamedTuple):
    """What `write_articles` read and wrote."""

    pages: int
    articles: int
    characters: int


def iter_pages(lines: Iterable[bytes]) -> Iterator[Page]:
    """Yields the complete pages of a dump; one that is cut off at the end is left out."""
    page: list[bytes] | None = None
    for line in lines:
        if line.strip() == b"<page>":
            page = []
        elif line.strip() == b"</page>" and page is not None:
            xml = b"".join(page).decode("utf-8", errors="replace")
            page = None
            title = re.search(r"<title>(.*?)</title>", xml)
            text = re.search(r"<text(?: [^<>]*)?(?<!/)>(.*)</text>", xml, re.S)
            if title is not None and text is not None:
                yield Page(_unescape_xml(title[1]), _unescape_xml(text[1]))
        elif page is not None:
            page.append(line)


def is_article(page: Page) -> bool:
    """Returns whether a page is an encyclopedia article: not a redirect, a disambiguation or a project page."""
    namespace, colon, _ = page.title.partition(":")
    if colon and namespace.strip().lower() in NAMESPACES:
        return False
    return not _REDIRECT.match(page.text) and not _DISAMBIGUATION.search(page.text)


def clean_article(text: str) -> str:
    """Returns the prose of an article's wikitext, paragraphs apart by one blank line; empty where there is none."""
    text = _strip_elements(text)
    text = _resolve_brackets(text)
    text = _LABELLED_URL.sub(lambda match: GONE if not match[1] or match[1].isdigit() else match[1], text)
    text = _BARE_URL.sub(HOLE, text)
    text = _MAGIC.sub("", text)
    paragraphs = (_finish(paragraph) for paragraph in _paragraphs(text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def write_articles(
    lines: Iterable[bytes], out: IO[bytes], *, on_article: Callable[[Counts], None] | None = None
) -> Counts:
    """Writes one JSON line per article of the dump and returns the counts; `on_article` is told them as they grow."""
    counts = Counts(0, 0, 0)
    for page in iter_pages(lines):
        counts = counts._replace(pages=counts.pages + 1)
        if not is_article(page):
            continue
        text = clean_article(page.text)
        if len(text) < MIN_ARTICLE_CHARACTERS:
            continue
        out.write(json.dumps({"title": page.title, "text": text}, ensure_ascii=False).encode() + b"\n")
        counts = counts._replace(articles=counts.articles + 1, characters=counts.characters + len(text))
        if on_article is not None:
            on_article(counts)
    return counts


def _unescape_xml(text: str) -> str:
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text


def _strip_elements(text: str) -> str:
    text = _COMMENT.sub("", text)
    text = _NOWIKI.sub(lambda match: re.sub(r"[^\w\s]", lambda mark: f"&#{ord(mark[0])};", match[1]), text)
    text = _UNSEEN.sub(GONE, text)
    text = _FORMULA.sub(_formula_text, text)
    text = _NOTE_MARK.sub(GONE, text)
    text = _EXPONENT.sub(r"^\1", text)
    text = _ITEM.sub("\n*", text)
    text = _BREAK.sub(" ", text)
    text = _BLOCK.sub("\n\n", text)
    # The bracket scanner below also pairs tables, so they stay, without their attributes, when the other tags go.
    text = _TABLE_TAG.sub(lambda match: f"\x02{match[1].lower()}\x03", text)
    text = _TAG.sub("", text)
    return text.replace("\x02", "<").replace("\x03", ">")


def _formula_text(match: re.Match[str]) -> str:
    if match[1].lower() != "math":
        return "\n\n"
    return match[2].strip() if _PLAIN_FORMULA.fullmatch(match[2]) and "<" not in match[2] else HOLE


class _Frame(NamedTuple):
    opener: str
    parts: list[str]


def _resolve_brackets(text: str) -> str:
    """Replaces links by what is read, and templates and tables by nothing, at any depth of nesting."""
    stack = [_Frame("", [])]
    position = 0
    for match in _BRACKET.finditer(text):
        token = match[0]
        if "|" in token and not _starts_line(text, match.start()):
            continue
        stack[-1].parts.append(text[position : match.start()])
        position = match.end()
        opener = _CLOSES.get(token)
        if opener is None:
            stack.append(_Frame(token, []))
        elif any(frame.opener == opener for frame in stack):
            while stack[-1].opener != opener:
                _abandon(stack)
            content = "".join(stack.pop().parts)
            stack[-1].parts.append(_READ[opener](content))
    stack[-1].parts.append(text[position:])
    while len(stack) > 1:
        _abandon(stack)
    return "".join(stack[0].parts)


def _starts_line(text: str, position: int) -> bool:
    """Whether only blanks and indents stand before a table's bracket; elsewhere `{|` and `|}` are arguments of templates."""
    return not text[text.rfind("\n", 0, position) + 1 : position].strip(" :*")


def _abandon(stack: list[_Frame]) -> None:
    """Gives up on a bracket that is never closed: its text stays, marked so that its paragraph is dropped."""
    unclosed = stack.pop()
    stack[-1].parts.extend((HOLE, *unclosed.parts))


def _link_text(content: str) -> str:
    target, *shown = content.split("|")
    target = target.strip()
    prefix, colon, _ = target.partition(":")
    if colon and (prefix.strip().lower() in INVISIBLE_LINKS or LANGUAGE.fullmatch(prefix.strip())):
        return GONE
    if not shown:
        page, _, section = target.removeprefix(":").partition("#")
        return page or section
    # An empty label is MediaWiki's shorthand for the name without what is in parentheses.
    return shown[-1] or re.sub(r"\s*\(.*\)$", "", target.removeprefix(":"))


def _template_text(content: str) -> str:
    name, *arguments = (part.strip() for part in content.split("|"))
    name = name.lower()
    if name in TEXT_TEMPLATES and arguments:
        return arguments[-1]
    if name == "nihongo" and arguments:
        return arguments[0]
    if name == "e" and arguments:
        return f"\u00d710^{arguments[0]}"
    return "\u02bb" if name == "okina" else GONE


_READ: dict[str, Callable[[str], str]] = {
    "[[": _link_text,
    "{{": _template_text,
    "{|": lambda content: f"\n{GONE}\n",
    "<table>": lambda content: f"\n{GONE}\n",
}


def _paragraphs(text: str) -> Iterator[str]:
    """Yields runs of prose lines, joined as MediaWiki joins them; lists, preformatted lines and closing sections are left out."""
    lines: list[str] = []
    skipped_level: int | None = None
    for raw in text.split("\n"):
        line = raw.lstrip(GONE + " ") if raw.startswith(GONE) else raw
        if raw.startswith(GONE) and not line:
            continue  # only a picture or a template: not the end of a paragraph
        heading = _HEADING.fullmatch(line)
        if heading is None and line.strip() and line[0] not in " \t*#:;|!{}-":
            if skipped_level is None:
                lines.append(line)
            continue
        if lines:
            yield " ".join(lines)
            lines = []
        if heading is not None:
            level, title = len(heading[1]), _QUOTES.sub("", heading[2]).strip().lower()
            if skipped_level is None or level <= skipped_level:
                skipped_level = level if DROPPED_SECTIONS.fullmatch(title) else None
    if lines:
        yield " ".join(lines)


def _finish(paragraph: str) -> str:
    """Returns a paragraph as a reader sees it, or an empty string where it is not worth keeping."""
    paragraph = _QUOTES.sub("", _POSSESSIVE.sub(r"\1's", paragraph))
    paragraph = _INVISIBLE.sub("", html.unescape(paragraph))
    had_gone = GONE in paragraph
    paragraph = _SPACES.sub(" ", paragraph)
    if any(mark in paragraph for mark in "()["):
        paragraph = _EMPTY_PARENTHESES.sub("", paragraph)
        paragraph = _OPEN_PUNCTUATION.sub("(", paragraph)
        paragraph = _CLOSE_PUNCTUATION.sub(")", paragraph)
    paragraph = _SPACE_BEFORE.sub(r"\1", paragraph).strip()
    if had_gone:
        paragraph = _DOUBLED_PUNCTUATION.sub("", paragraph)
    if paragraph.endswith(":"):
        # It announced a list that is gone.
        ends = list(_LAST_SENTENCE.finditer(paragraph))
        paragraph = paragraph[: ends[-1].end()] if ends else ""
    if len(paragraph) < MIN_PARAGRAPH_CHARACTERS or not _SENTENCE_END.search(paragraph) or _LEFT_OVER.search(paragraph):
        return ""
    return paragraph


def main() -> int:
    """Command line: DUMP.xml[.gz] OUT.jsonl."""
    parser = argparse.ArgumentParser(description="MediaWiki XML dump -> plain article text, one JSON line per article.")
    parser.add_argument("dump", type=Path, help="pages-articles XML, plain or .gz")
    parser.add_argument("out", type=Path, help="where to write the .jsonl file")
    arguments = parser.parse_args()
    started = time.monotonic()
    open_dump = gzip.open if arguments.dump.suffix == ".gz" else open
    with open_dump(arguments.dump, "rb") as lines, arguments.out.open("wb") as out:
        counts = write_articles(lines, out)
    print(
        f"{counts.articles:,} articles of {counts.pages:,} pages, {counts.characters:,} characters, "
        f"{time.monotonic() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

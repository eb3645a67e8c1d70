"""The Wikipedia cleaner: what a reader sees is kept, what only MediaWiki needs is gone, what cannot be read whole is dropped."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.prepare_wikipedia import Counts, Page, clean_article, is_article, iter_pages, write_articles

REST = " and this sentence is long enough to be kept as a paragraph of its own."


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        pytest.param("A [[cat]]", "A cat", id="link"),
        pytest.param("A [[Felis catus|cat]]s", "A cats", id="link-with-label-and-trail"),
        pytest.param("A [[Mercury (planet)|]]", "A Mercury", id="link-with-empty-label"),
        pytest.param("A [[#Later|cat]], [[#Tuning]] [[Cat#Food]]", "A cat, Tuning Cat", id="section-links"),
        pytest.param("A [[:Category:Cats|cat]]", "A cat", id="visible-category"),
        pytest.param("A [[Category:Cats]]cat", "A cat", id="category"),
        pytest.param("A [[fr:Chat]][[zh-min-nan:Niau]]cat", "A cat", id="interwiki"),
        pytest.param("The [[Star Trek: Voyager]]", "The Star Trek: Voyager", id="title-with-colon"),
        pytest.param(
            "A [[Image:Cat.jpg|thumb|A [[cat]] in {{convert|3|m}} height]]cat", "A cat", id="image-with-nested-links"
        ),
        pytest.param("A '''''very''''' ''big'' '''cat'''", "A very big cat", id="bold-italic"),
        pytest.param("The ''Enterprise'''s crew", "The Enterprise's crew", id="possessive-after-italic"),
        pytest.param("A {{infobox|a={{b|c}}|d=[[e]]}}cat", "A cat", id="nested-template"),
        pytest.param("A {{box|[[x}}cat", "A cat", id="unclosed-link-in-a-template"),
        pytest.param("A ]] cat", "A cat", id="link-that-was-never-opened"),
        pytest.param("It is {{IPA|kaet}}", "It is kaet", id="text-template"),
        pytest.param("5{{e|6}} cats", "5\u00d710^6 cats", id="exponent-template"),
        pytest.param("A cat (''[[Latin]]:'' {{note|1}})", "A cat (Latin)", id="closing-punctuation"),
        pytest.param("A cat ({{audio}}; {{x}})", "A cat", id="empty-parentheses"),
        pytest.param("A cat {{fact}}, a dog", "A cat, a dog", id="space-before-punctuation"),
        pytest.param("A cat<ref name='a'>Book, p. 3</ref><ref name='a'/>", "A cat", id="footnotes"),
        pytest.param("A cat.<sup>12</sup> So", "A cat. So", id="footnote-mark"),
        pytest.param("10<sup>6</sup> km<sup>2</sup> of H<sub>2</sub>O", "10^6 km^2 of H2O", id="exponents"),
        pytest.param("A<!-- not\nthis --> cat", "A cat", id="comment"),
        pytest.param("A <b>big</b><br/>cat", "A big cat", id="tags"),
        pytest.param("Write <nowiki>[[x]] ''</nowiki>", None, id="nowiki-that-looks-like-markup"),
        pytest.param("Write <nowiki>*x;</nowiki>", "Write *x;", id="nowiki"),
        pytest.param("A [http://example.org/a cat] [http://example.org 1]", "A cat", id="labelled-url"),
        pytest.param("A&nbsp;cat &mdash; one &amp;c", "A cat \u2014 one &c", id="entities"),
        pytest.param("The length <math>n</math>", "The length n", id="plain-formula"),
        pytest.param("The length <math>\\sqrt{n}</math>", None, id="formula"),
        pytest.param("See http://example.org/a,", None, id="bare-url"),
        pytest.param("A [[cat", None, id="unclosed-link"),
        pytest.param("A cat __NOTOC__", "A cat", id="magic-word"),
    ],
)
def test_clean_article_keeps_what_is_read(wikitext: str, expected: str | None) -> None:
    assert clean_article(wikitext + REST) == ("" if expected is None else expected + REST)


KEPT = "This paragraph is prose that is long enough, and it ends as sentences do."
OTHER = "And this is another paragraph of prose, long enough too; it has its end."


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        pytest.param(f"{KEPT}\n\n{OTHER}", [KEPT, OTHER], id="paragraphs"),
        pytest.param(KEPT.replace(" that ", "\nthat "), [KEPT], id="hard-wrapped-lines"),
        pytest.param(f"== A ==\n{KEPT}\n== See also ==\n{OTHER}\n=== B ===\n{OTHER}", [KEPT], id="closing-sections"),
        pytest.param(f"== Notes ==\n{OTHER}\n== B ==\n{KEPT}", [KEPT], id="section-after-a-dropped-one"),
        pytest.param(f"{KEPT}\n* {OTHER}\n# {OTHER}\n: {OTHER}\n; {OTHER}", [KEPT], id="lists"),
        pytest.param(f"{KEPT}\n\n {OTHER}", [KEPT], id="preformatted"),
        pytest.param(f"[[Image:A.jpg]] {KEPT}", [KEPT], id="image-at-the-start-of-a-line"),
        pytest.param(f"{{{{stub}}}}\n{KEPT}\n[[Category:A]]\n[[de:A]]", [KEPT], id="templates-and-categories-around"),
        pytest.param(f"{{|\n| {OTHER}\n{{|\n| b\n|}}\n|}}\n{KEPT}", [KEPT], id="nested-tables"),
        pytest.param(f"<table><tr><td>{OTHER}<table><tr><td>b</table></table>\n{KEPT}", [KEPT], id="html-tables"),
        pytest.param(f"<gallery>\nImage:A.jpg|{OTHER}\n</gallery>\n{KEPT}", [KEPT], id="gallery"),
        pytest.param(f"<ul><li>{OTHER}</ul>\n{KEPT}", [KEPT], id="html-list"),
        pytest.param(f"{KEPT} It has these parts:\n* one", [KEPT], id="announcement-of-a-list"),
        pytest.param(f"{KEPT}\n\nToo short.", [KEPT], id="short-paragraph"),
        pytest.param(f"{KEPT}\n\n{OTHER[:-1]}", [KEPT], id="no-end-of-sentence"),
        pytest.param(
            f"{{{{box\n| a = 1\n\n{KEPT}\n\n{OTHER}", [KEPT, OTHER], id="unclosed-template-loses-its-own-lines-only"
        ),
        pytest.param("", [], id="empty"),
    ],
)
def test_clean_article_keeps_paragraphs_of_prose(wikitext: str, expected: list[str]) -> None:
    assert clean_article(wikitext) == "\n\n".join(expected)


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        ("Cat", "A cat.", True),
        ("Star Trek: Voyager", "A series.", True),
        ("Wikipedia:Policy", "A policy.", False),
        ("Template talk:Box", "A box.", False),
        ("Cats", "#REDIRECT [[Cat]]", False),
        ("Cats", "# redirect [[Cat]]", False),
        ("Cat (x)", "Cat may mean:\n{{disambig}}", False),
        ("CAT", "CAT may mean:\n{{TLAdisambig}}", False),
    ],
)
def test_is_article(title: str, text: str, expected: bool) -> None:
    assert is_article(Page(title, text)) is expected


def dump(*pages: tuple[str, str], cut_off: bool = False) -> bytes:
    """A MediaWiki dump; the last page of a cut-off one has no end."""
    parts = ["<mediawiki>\n"]
    for title, text in pages:
        parts.append(
            f"  <page>\n    <title>{title}</title>\n    <id>1</id>\n"
            f'      <text xml:space="preserve">{text}</text>\n    </revision>\n  </page>\n'
        )
    if cut_off:
        parts[-1] = parts[-1].partition("</text>")[0]
    return "".join(parts).encode()


def test_iter_pages_unescapes_once_and_leaves_out_a_page_that_is_cut_off() -> None:
    pages = dump(("R&amp;B", "a &lt;b&gt; &amp;nbsp; &amp;lt;\nc"), ("Empty", ""), ("Cut", "text"), cut_off=True)
    assert list(iter_pages(io.BytesIO(pages))) == [Page("R&B", "a <b> &nbsp; &lt;\nc"), Page("Empty", "")]


def test_write_articles_skips_what_is_too_short_and_counts() -> None:
    long = "\n\n".join([KEPT, OTHER] * 4)
    out = io.BytesIO()
    seen: list[Counts] = []
    counts = write_articles(
        io.BytesIO(dump(("Cat", long), ("Kitten", KEPT), ("Cats", "#REDIRECT [[Cat]]"), ("Dog \u00e9", long))),
        out,
        on_article=seen.append,
    )
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert rows == [{"title": "Cat", "text": long}, {"title": "Dog \u00e9", "text": long}]
    assert counts == Counts(pages=4, articles=2, characters=2 * len(long)) == seen[-1]


def test_command_line_reads_a_compressed_dump(tmp_path: Path) -> None:
    source, out = tmp_path / "dump.xml.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(dump(("Cat", "\n\n".join([KEPT, OTHER] * 4)))))
    script = Path(__file__).parents[2] / "scripts" / "prepare_wikipedia.py"
    done = subprocess.run([sys.executable, script, source, out], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 articles of 1 pages, ")
    assert json.loads(out.read_text(encoding="utf-8"))["title"] == "Cat"

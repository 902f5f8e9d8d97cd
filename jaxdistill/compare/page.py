"""The comparison as one HTML page that needs nothing else: tables, figures and notes, top to bottom from what matters most."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from jaxdistill.compare.board import Board
from jaxdistill.compare.entries import Entry
from jaxdistill.compare.plots import cost_plots, kept_map, lost_maps
from jaxdistill.compare.published import Key
from jaxdistill.compare.speed import choose_setting, milliseconds
from jaxdistill.compare.table import Table, difference_table, legend, marks, model_cell, model_notes, p_text, size_text

HERE = Path(__file__).parent


def html_page(board: Board, headline: Sequence[str], made: Sequence[str], sources: Sequence[str]) -> str:
    """The page. Every name in it is escaped; it refers to nothing outside itself."""
    first, *more = headline
    head = f'<p class="headline">{escape(first)}</p>'
    head += f'<p class="headline more">{escape(" ".join(more))}</p>' if more else ""
    sections = [
        _scores(board),
        _figures(board),
        _details(board),
        _lost(board),
        _listed("Notes and what is missing", model_notes(board)),
        _listed("How it was made", made, code="To repeat: "),
        _listed("Published values", sources),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Comparison</title>\n'
        f"<style>\n{(HERE / 'page.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header><h1>Comparison</h1>{head}</header>\n<main>\n{''.join(f'{section}{chr(10)}' for section in sections if section)}</main>\n"
        f"<script>\n{(HERE / 'page.js').read_text(encoding='utf-8')}</script>\n</body>\n</html>\n"
    )


def _head(titles: Sequence[str]) -> str:
    cells = []
    for title in titles:
        name, _, more = title.partition(" (")
        small = f"<small>{escape(more.removesuffix(')'))}</small>" if more else ""
        cells.append(f'<th scope="col"><button type="button">{escape(name)}{small}</button></th>')
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _row_class(board: Board, entry: Entry) -> str:
    return "reference" if entry is board.reference else "" if entry.measured else "published"


def _name(board: Board, entry: Entry) -> str:
    tag = ' <span class="tag">reference</span>' if entry is board.reference else ""
    return f'<td data-v="{escape(entry.name)}">{_breakable(entry.name)}{tag}</td>'


def _breakable(name: str) -> str:
    """A name that may go on in the next line after each of its parts."""
    return re.sub(r"([._/-])(?=\w)", r"\1<wbr>", escape(name))


def _score(board: Board, entry: Entry, key: Key, best: dict[str, float | None]) -> str:
    """Ours with its deviation; the published value and the difference to the reference small below it."""
    cell = board.cell(entry, key)
    if cell is None:
        return '<td data-v="">&ndash;</td>'
    number = f"{cell.mean:.1f}"
    if entry.measured and cell.mean == best["all"]:
        number = f"<b>{number}</b>"
    elif entry.measured and cell.mean == best["others"]:
        number = f"<u>{number}</u>"
    spread = f' <span class="sd">± {cell.deviation:.1f}</span>' if cell.deviation is not None else ""
    difference = board.differences.get((entry.name, key))
    mark, title = escape(marks(board, entry, key)), ""
    if difference and difference.mean is not None:
        way = "up" if difference.mean > 0 else "down"
        said = f"p {p_text(difference.p)}, n {difference.n}" if difference.p is not None else difference.why
        title = f' title="{escape(f"{difference.mean:+.1f} to {board.reference.name}, {said}")}"'
        mark = mark.replace("*", f'<span class="{way}">*</span>')
    published = board.published(entry, key)
    below = f'<small title="{escape(published[1])}">published {published[0]:.1f}</small>' if published else ""
    return f'<td data-v="{cell.mean:.4f}"{title}>{number}{spread}{mark}{below}</td>'


def _score_table(board: Board, keys: dict[Key, str], entries: Sequence[Entry], *, sizes: bool = False) -> str:
    setting = choose_setting(board.measured) if sizes else None
    titles = ["model", *(["parameters (M)"] if sizes else []), *(["latency (ms)"] if setting else []), *keys.values()]
    others = [entry for entry in board.measured if entry is not board.reference]
    best = {key: {"all": board.best(key, board.measured), "others": board.best(key, others)} for key in keys}
    rows = []
    for entry in entries:
        cells = [_name(board, entry)]
        if sizes:
            cells.append(f'<td data-v="{entry.parameters or ""}">{size_text(entry).replace("-", "&ndash;")}</td>')
        if setting:
            time = milliseconds(entry, setting)
            spread = f' <span class="sd">± {time[1]:.1f}</span>' if time and time[1] is not None else ""
            cells.append(f'<td data-v="{time[0]:.4f}">{time[0]:.1f}{spread}</td>' if time else '<td data-v="">&ndash;</td>')
        cells += [_score(board, entry, key, best[key]) for key in keys]
        rows.append(f'<tr class="{_row_class(board, entry)}">{"".join(cells)}</tr>')
    return f'<div class="scroll"><table class="sortable">{_head(titles)}<tbody>{"".join(rows)}</tbody></table></div>'


def _scores(board: Board) -> str:
    table = _score_table(board, board.columns, board.entries, sizes=True)
    best = ["Blue: the best measured here; underlined: the best apart from the reference."] if board.reference else []
    said = [*legend(board), *best, "A click on a heading sorts."]
    items = "".join(f"<li>{escape(line)}</li>" for line in said)
    return f'<section><h2>Scores</h2>{table}<ul class="legend">{items}</ul></section>'


def _figures(board: Board) -> str:
    found = cost_plots(board)
    plots = "".join(
        f"<figure><figcaption>{escape(title)}<span>{escape(note)}</span></figcaption>{svg}</figure>" for title, note, svg in found
    )
    parts = f'<section><h2>Score against cost</h2><div class="plots">{plots}</div></section>' if plots else ""
    if kept := kept_map(board):
        title, note, svg = kept
        figure = f"<figure>{svg}</figure>"
        parts += f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p><div class="maps">{figure}</div></section>'
    return parts


def _details(board: Board) -> str:
    parts = []
    differences = difference_table(board)
    if differences.rows and board.columns:
        parts.append(f"<details><summary>{escape(differences.title)}, with p values</summary>{_plain_table(differences)}</details>")
    for keys, title in ((board.others, "Other tests and metrics"), (board.languages, "Per language")):
        entries = [entry for entry in board.entries if any(board.cell(entry, key) for key in keys)]
        if keys and entries:
            opened = " open" if keys is board.languages and len(entries) <= 20 else ""
            parts.append(f"<details{opened}><summary>{title}</summary>{_score_table(board, keys, entries)}</details>")
    return f"<section><h2>In detail</h2>{''.join(parts)}</section>" if parts else ""


def _plain_table(table: Table) -> str:
    """Texts as they are: no column to sort by."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _lost(board: Board) -> str:
    """Section `lost` of every model: its numbers, tables and heat maps."""
    parts = []
    for entry in board.measured:
        if not entry.lost:
            continue
        teacher = escape(str(entry.lost.get("teacher", "its teacher")))
        block = f"<h3>{escape(model_cell(board, entry))} against {teacher}</h3>"
        answers = entry.lost.get("answers")
        if isinstance(answers, list):
            block += f"<ul>{''.join(f'<li>{escape(str(line))}</li>' for line in answers)}</ul>"
        numbers = {name.replace("_", " "): value for name, value in (entry.lost.get("numbers") or {}).items() if value is not None}
        if numbers:
            items = "; ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items())
            block += f'<details><summary>Numbers</summary><p class="note">{escape(items)}</p></details>'
        figures = "".join(
            f"<figure><figcaption>{escape(title)}<span>{escape(note)}</span></figcaption>{svg}</figure>"
            for title, note, svg in lost_maps(entry)
        )
        block += f'<div class="maps">{figures}</div>' if figures else ""
        for table in entry.lost.get("tables") or []:
            texts = [tuple(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) for row in table.get("rows", [])]
            shown = _plain_table(Table(str(table.get("title", "")), tuple(map(str, table.get("columns", []))), texts))
            block += f"<details><summary>{escape(str(table.get('title', 'Table')))}</summary>{shown}</details>"
        parts.append(block)
    return f"<section><h2>What is lost</h2>{''.join(parts)}</section>" if parts else ""


def _listed(title: str, lines: Sequence[str], code: str = "") -> str:
    if not lines:
        return ""
    items = []
    for line in lines:
        is_code = code and line.startswith(code)
        items.append(f"<li>{escape(code)}<code>{escape(line.removeprefix(code))}</code></li>" if is_code else f"<li>{escape(line)}</li>")
    return f"<section><h2>{escape(title)}</h2><ul>{''.join(items)}</ul></section>"

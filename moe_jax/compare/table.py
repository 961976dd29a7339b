"""A comparison on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_jax.compare.comparison import Comparison
from moe_jax.compare.words import TableRow, collective_rows, generated_texts, summary_rows
from moe_jax.deployments.placement import placement_rows
from moe_jax.train.tokenizer import Tokenizer

_PLAIN_WIDTH = 120  # characters, where no terminal says its own


def print_comparison(
    comparison: Comparison, tokenizer: Tokenizer | None, console: Console | None = None
) -> None:
    """Print the tables, a sample of the generated text, what failed, and the verdict as the last line."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    batch = f"{comparison.num_sequences} sequences of {comparison.seq_len} {comparison.tokens} tokens"
    console.print(escape(f"{comparison.checkpoint}, step {comparison.step}; {batch}; {comparison.machine}"))
    console.print(
        _table("Results (speeds hold for this run on this machine)", summary_rows(comparison), comparison)
    )
    title = "Collectives of the compiled programs, executions and bytes that a device sends"
    console.print(_table(title, collective_rows(comparison), comparison))
    console.print(_placement_table(comparison))
    _print_text(comparison, tokenizer, console)
    for line in comparison.failures:
        console.print(f"[bold red]failed:[/] {escape(line)}", soft_wrap=True)
    style = "bold red" if comparison.failures else "bold green"
    console.print(f"[{style}]{escape(comparison.verdict())}[/]", soft_wrap=True)


def _table(title: str, rows: list[TableRow], comparison: Comparison) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for entry in comparison.entries:
        table.add_column(escape(entry.name), justify="right")
    for row in rows:
        table.add_row(escape(row.label), *map(escape, row.cells))
    return table


def _placement_table(comparison: Comparison) -> Table:
    title = "Placement of the experts, from the arrays' shardings (by device where devices differ)"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("", "devices", "layers", "experts", "of their hidden width"):
        table.add_column(column, overflow="fold")
    for entry in comparison.entries:
        for row in placement_rows(entry.measurement.placement):
            cells = (entry.name, row.devices, row.layers, row.experts, row.hidden)
            table.add_row(*map(escape, cells))
        table.add_section()
    return table


def _print_text(comparison: Comparison, tokenizer: Tokenizer | None, console: Console) -> None:
    """The first prompt, and what each deployment generated after it, a line each."""
    texts = {entry.name: generated_texts(entry, tokenizer)[:1] for entry in comparison.entries}
    width = max(map(len, texts))
    for name, pairs in texts.items():
        for prompt, generated in pairs:
            if name == comparison.reference.name:
                console.print(escape(f"Prompt: {prompt!r}; the text that follows it by"), soft_wrap=True)
            console.print(escape(f"  {name:{width}}  {generated!r}"), soft_wrap=True)

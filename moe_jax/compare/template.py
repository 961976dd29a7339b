"""The page of the report, for jinja2."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: #fcfcfd; color: #1c2430;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p.about { margin: 0 0 1.2rem; color: #4a5361; }
.verdict { padding: .7rem 1rem; border-left: 5px solid; border-radius: 3px; }
.verdict.equal { border-color: #00865f; background: #e6f5ef; }
.verdict.different { border-color: #c0392b; background: #fbeae8; }
.verdict ul { margin: .4rem 0 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; border-bottom: 1px solid #e1e5ea; text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid #aab2bd; }
th:first-child, td:first-child { text-align: left; white-space: pre; padding-left: 0; }
tbody th { font-weight: 400; }
table.text td, table.text th { text-align: left; }
figure { margin: 0 0 1rem; }
figure svg { width: 100%; height: auto; }
figcaption { color: #4a5361; font-size: .9rem; max-width: 52rem; }
pre .prompt { color: #6b7482; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.45 ui-monospace, monospace; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="about">{{ about }}</p>
<div class="verdict {{ 'different' if failures else 'equal' }}"><strong>{{ verdict }}</strong>
{% if failures %}<ul>{% for line in failures %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}</div>
{% macro rows_table(rows) %}
<div class="scroll"><table>
<thead><tr><th></th>{% for name in names %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr><th scope="row">{{ row.label }}</th>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{% endmacro %}
<h2>Results</h2>
{{ rows_table(summary) }}
<p class="about">{{ speed_note }}</p>
{% for figure in figures %}
<h2>{{ figure.title }}</h2>
<figure id="figure-{{ figure.name }}">{{ figure.svg | safe }}
<figcaption>{{ figure.caption }}</figcaption></figure>
{% if figure.name == 'bytes' %}{{ rows_table(collectives) }}{% endif %}
{% if figure.name == 'placement' %}
<div class="scroll"><table class="text">
<thead><tr><th></th><th>devices</th><th>layers</th><th>experts</th><th>of their hidden width</th></tr></thead>
<tbody>{% for name, row in placement %}
<tr><th scope="row">{{ name }}</th><td>{{ row.devices }}</td><td>{{ row.layers }}</td>
<td>{{ row.experts }}</td><td>{{ row.hidden }}</td></tr>{% endfor %}
</tbody></table></div>
{% endif %}
{% endfor %}
{% if texts %}
<h2>Generated text</h2>
<p class="about">The most likely token each time, after the first tokens (grey) of sequences of the batch.</p>
<div class="scroll"><table class="text"><tbody>{% for text in texts %}
<tr><th scope="row">{{ text.names }}</th>
<td><pre><span class="prompt">{{ text.prompt }}</span><strong>{{ text.generated }}</strong></pre></td>
</tr>{% endfor %}
</tbody></table></div>
{% endif %}
</body>
</html>
"""

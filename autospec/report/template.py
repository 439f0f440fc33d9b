"""The report's page, as a Jinja template: no script, style sheet, font or picture comes from elsewhere."""

PAGE = """\
{% macro show(table) %}
<h3 id="{{ table.id }}">{{ table.title }}</h3>
<p class="caption" id="{{ table.id }}-caption">{{ table.caption }}</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="{{ table.id }}">
<table class="sortable" aria-labelledby="{{ table.id }}" aria-describedby="{{ table.id }}-caption">
<thead><tr>{% for column in table.columns %}<th scope="col" aria-sort="none"><button type="button">{{ column }}</button></th>
{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td{% if cell.kind %} class="{{ cell.kind }}"{% endif %}
{%- if cell.key is not none %} data-key="{{ cell.key }}"{% endif %}>{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
</div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light; --ink: #1b1b1b; --soft: #555; --line: #d5d5d5; --accent: #0b5c94; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 73rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
a { color: var(--accent); }
nav ul { padding-left: 1.1rem; }
.note { border-left: 4px solid #d55e00; padding: .4rem 1rem; background: #fdf4ee; max-width: 48rem; }
figure { margin: 1.25rem 0 2.25rem; }
figure img { width: 100%; height: auto; border: 1px solid var(--line); }
figure.page img { max-width: 52rem; display: block; }
figcaption { color: var(--soft); max-width: 46rem; margin-top: .5rem; font-size: .95rem; }
p.caption { color: var(--soft); font-size: .95rem; }
.scroll { overflow-x: auto; max-height: 32rem; overflow-y: auto; border: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number { text-align: right; }
td.sentence { white-space: normal; min-width: 22rem; }
thead th { white-space: normal; min-width: 3.75rem; vertical-align: bottom; }
thead th { position: sticky; top: 0; background: #f3f3f3; }
thead button { all: unset; cursor: pointer; font-weight: 600; }
thead button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort="ascending"] button::after { content: " \\25B2"; }
th[aria-sort="descending"] button::after { content: " \\25BC"; }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
{% if experiments %}<p>Spectra of the learning signal, recorded inside automatic differentiation while each network trained: the
singular values of every layer's weight gradient, of the activations that enter it and of the adjoints that leave it,
for the whole batch and for each group of samples.</p>{% endif %}
</header>
<nav aria-label="Contents"><ul>
{% if cohort %}<li><a href="#cohort">The cohort</a></li>{% endif %}
{% if experiments %}<li><a href="#reading">How to read the figures</a></li>
{% for experiment in experiments %}<li><a href="#figure-{{ experiment.key }}">{{ experiment.heading }}</a></li>
{% endfor %}<li><a href="#tables">Tables</a></li>{% endif %}
{% if calibration %}<li><a href="#calibration">How often the tests err</a></li>{% endif %}
</ul></nav>
{% if cohort %}
<section aria-labelledby="cohort">
<h2 id="cohort">The cohort</h2>
{% if cohort.simulated or cohort.stand_in %}<p class="note"><strong>Not for conclusions about brains.</strong>
{% if cohort.simulated %}The data are simulated: no person was scanned.{% endif %}
{% if cohort.stand_in %}Networks were found with the stand-in template, not with NeuroMark 1.0.{% endif %}</p>{% endif %}
{% for table in cohort.tables if table.rows %}{{ show(table) }}{% endfor %}
{% if cohort.warnings %}
<h3>Remarks on the data</h3>
<ul>
{% for warning in cohort.warnings %}<li>{{ warning }}</li>
{% endfor %}</ul>
{% endif %}
{% for picture in cohort.pictures %}
<h3>{{ picture.title }}</h3>
<figure>
<img src="{{ picture.image }}" alt="{{ picture.title }} of the cohort">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</section>
{% endif %}
{% if experiments %}
<p class="note"><strong>What the significance marks are not.</strong> {{ warning }}</p>
<section aria-labelledby="reading">
<h2 id="reading">How to read the figures</h2>
<ul>
<li>A <strong>gradient</strong> column shows the singular values of each group's share of the weight's gradient: the
part of the batch's gradient that comes from the group's samples. The shares add up to the whole.</li>
<li>An <strong>activation</strong> column shows those of the rows that enter the layer; an <strong>adjoint</strong>
column those of the derivatives of the loss at its output. Under full-batch training the input of the first layer
never changes, so its lines are flat.</li>
<li>Beside each panel stands how well the network did on <strong>held-out</strong> samples. A network at chance is drawn
in grey: a difference of groups in a model that learned nothing is no finding.</li>
<li>The dotted black line is the <strong>limit of resolution</strong>: the singular values of a group's share differ from
those of the share of all other samples by at most the largest singular value of the whole batch's gradient. Pale lines lie
beyond the rank that the group's samples allow.</li>
<li>The vertical axis is a singular value, on a logarithmic scale; one row of axes for each layer's weight.
&sigma;<sub>1</sub> is the largest singular value; where lines crowd, not all of them are labelled. Lines get thinner with the number of the singular value; the
dashed grey line is the whole batch. A value whose neighbours are zero or were not recorded is a dot.</li>
<li>Panels that compare two groups colour the ratio of their singular values: one row of cells for each singular
value, one column for each recorded step. Orange means that the first group's is larger, purple that the second's
is.</li>
<li>Three kinds of test can be marked, and each panel names its own. <strong>paper</strong> repeats the paper's t-tests and
describes one run. <strong>permutation</strong> and <strong>refit</strong> are tests of groups: labels are permuted with the
weights as they are, or before the training, which is repeated.</li>
<li>Grey areas lie below the noise floor, the highest of the groups': there a value is rounding, and nothing is called significant.
Hatched cells lie beyond the rank that either group's samples allow.</li>
<li>Groups of different size differ by size alone; look at the numbers of samples before you read a difference.</li>
</ul>
</section>
{% for experiment in experiments %}
<section aria-labelledby="figure-{{ experiment.key }}">
<h2 id="figure-{{ experiment.key }}">{{ experiment.heading }}</h2>
<p>{{ experiment.data }}</p>
<figure class="page">
<img src="{{ experiment.image }}" alt="{{ experiment.panels | length }} panels of spectra and group differences for
{{ experiment.title }}">
<figcaption>{{ experiment.caption }}</figcaption>
</figure>
{% for panel in experiment.panels %}
<h3>{{ panel.letter }}. {{ panel.content }}</h3>
<figure>
<img src="{{ panel.image }}" alt="Panel {{ panel.letter }}: {{ panel.content }}">
<figcaption>{{ panel.caption }}</figcaption>
</figure>
{% endfor %}
{% if experiment.supplement %}
<h3>Supplement</h3>
<p><a class="beside" href="{{ experiment.supplement.link }}"><code>{{ experiment.supplement.link }}</code></a>
{{ experiment.supplement.caption }}</p>
{% endif %}
</section>
{% endfor %}
<section aria-labelledby="tables">
<h2 id="tables">Tables</h2>
<p>Click a column's head to sort by it. The full tables of tests are in <code>results/statistics</code>, the
trajectories in <code>results/runs</code>; <code>autospec.open_trajectories(path)</code> opens them.</p>
{% for table in tables %}{{ show(table) }}{% endfor %}
</section>
{% endif %}
{% if calibration %}
<section aria-labelledby="calibration">
<h2 id="calibration">How often the tests err</h2>
<p>Each test on many studies in which the truth is known. A test at 5 % should reject in 5 % of those in which nothing
differs.</p>
<figure>
<img src="{{ calibration.image }}" alt="False positives and power of each test">
<figcaption>Above: rejections where the labels make no difference, with exact 95 % intervals. Below: power.</figcaption>
</figure>
{{ show(calibration.table) }}
</section>
{% endif %}
<script>
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const rising = head.getAttribute("aria-sort") !== "ascending";
    const key = (row) => { const cell = row.cells[column];
      return cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key); };
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
      return rising ? order : -order; });
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}
</script>
</body>
</html>
"""

"""The report's style sheet. Two sets of colours, chosen by the reader's system; everything else in relative units."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #5b6875; --line: #e2e6eb; --faint: #eef1f4;
  --a: #2563eb; --b: #94a3b8; --c: #0d9488; --d: #d97706; --e: #7c3aed; --f: #db2777;
  --good: #15803d; --good-page: #edf9f0; --bad: #b42318; --bad-page: #fdf0ee;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141a; --card: #171e26; --ink: #e7ecf1; --soft: #98a5b3; --line: #2a343f; --faint: #1f2831;
    --a: #6ea8fe; --b: #7b8a9a; --c: #2dd4bf; --d: #f5b04c; --e: #b69cff; --f: #f78fc0;
    --good: #5fd38a; --good-page: #14271c; --bad: #ff9a8d; --bad-page: #2f1a18;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0 0 18px; }
h1 b { color: var(--ink); }
h2 { font-size: 1.3rem; margin: 52px 0 6px; letter-spacing: -0.01em; }
h3 { font-size: 0.98rem; margin: 0; font-weight: 600; }
p { margin: 0; } p.lead { color: var(--soft); margin-bottom: 18px; max-width: 76ch; }
code, pre, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; min-width: 0; }
.card p { color: var(--soft); font-size: 0.86rem; margin: 3px 0 10px; }

.verdict { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 28px; align-items: center;
  padding: 26px 30px; }
.verdict .numbers { display: flex; align-items: baseline; gap: 0.28em; letter-spacing: -0.03em;
  font-size: clamp(2rem, 4vw, 3.1rem); font-weight: 650; line-height: 1.15; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.verdict .was { color: var(--soft); font-weight: 450; } .verdict .arrow { color: var(--b); font-weight: 400; }
.verdict .now { color: var(--a); }
.verdict p { font-size: 1rem; margin: 12px 0 0; }
.verdict .warning { color: var(--bad); }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; margin-top: 14px; }
.figures dt { color: var(--soft); font-size: 0.82rem; }
.figures dd { margin: 2px 0 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures small { display: block; font-size: 0.8rem; font-weight: 400; color: var(--soft); }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px; }
@media (min-width: 960px) {  /* an odd last chart: text and legend beside it */
  .charts > :last-child:nth-child(odd) { grid-column: 1 / -1; display: grid; grid-template-columns: 1fr 1fr;
    grid-template-rows: auto auto 1fr; column-gap: 34px; }
  .charts > :last-child:nth-child(odd) svg { grid-area: 1 / 2 / 4 / 3; }
  .charts > :last-child:nth-child(odd) .legend { flex-direction: column; }
}
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
svg .note { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .reference { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 5 4; }
svg .curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
svg .point { fill: transparent; } svg .point:hover { fill: var(--ink); }
svg .curve.a { stroke: var(--a); } svg .curve.b { stroke: var(--b); } svg .curve.c { stroke: var(--c); }
svg .curve.d { stroke: var(--d); } svg .curve.e { stroke: var(--e); } svg .curve.f { stroke: var(--f); }
svg .a { fill: var(--a); } svg .b { fill: var(--b); } svg .c { fill: var(--c); }
svg .d { fill: var(--d); } svg .e { fill: var(--e); } svg .f { fill: var(--f); }
svg polyline.curve { fill: none; } svg .whisker { opacity: 0.32; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0 0; padding: 0; list-style: none;
  font-size: 0.83rem; color: var(--soft); }
.legend i { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 3px; margin-right: 0.45em; }
.legend .a { background: var(--a); } .legend .b { background: var(--b); } .legend .c { background: var(--c); }
.legend .d { background: var(--d); } .legend .e { background: var(--e); } .legend .f { background: var(--f); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 0.83rem; }
th, td { padding: 8px 14px 8px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
td.mono, .digest { overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); } .quiet { color: var(--soft); }

.samples { display: grid; gap: 12px; }
.sample { padding: 0; overflow: hidden; }
.sample > p { margin: 0; padding: 12px 18px; color: var(--ink); font-size: 0.94rem; white-space: pre-wrap;
  overflow-wrap: anywhere; border-bottom: 1px solid var(--line); }
.sample > p .quiet { float: right; margin-left: 16px; }
.answers { display: grid; grid-template-columns: 1fr 1fr; }
.answer { padding: 12px 18px; min-width: 0; } .answer + .answer { border-left: 1px solid var(--line); }
.answer header { font-size: 0.8rem; color: var(--soft); display: flex; justify-content: space-between; gap: 8px; }
.answer pre { margin: 4px 0 0; font-size: 0.96rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22em;
  overflow-y: auto; }
.answer.right { background: var(--good-page); } .answer.wrong { background: var(--bad-page); }
.answer.right .mark { color: var(--good); font-weight: 600; }
.answer.wrong .mark { color: var(--bad); font-weight: 600; }

details summary { cursor: pointer; color: var(--soft); font-size: 0.92rem; }
details pre { overflow-x: auto; font-size: 0.82rem; line-height: 1.5; margin: 12px 0 0; }
.stack { display: grid; gap: 14px; } .stack > * { min-width: 0; }
footer { color: var(--soft); font-size: 0.83rem; margin-top: 44px; }

@media (max-width: 720px) {
  main { padding: 22px 14px 44px; }
  h2 { margin-top: 38px; }
  .verdict { grid-template-columns: 1fr; padding: 20px 18px; gap: 16px; }
  .card { padding: 15px 15px; } .sample { padding: 0; }
  .figures { grid-template-columns: 1fr 1fr; }
  .charts svg text { font-size: 14.5px; } .verdict svg text { font-size: 20px; }
  .answer, .sample > p { padding: 10px 13px; }
}
@media (max-width: 520px) {
  .answers { grid-template-columns: 1fr; }
  .answer + .answer { border-left: 0; border-top: 1px solid var(--line); }
}
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""

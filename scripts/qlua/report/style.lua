--- The page's style sheet. Blue is the full model and vermilion the quantized one, in light, dark and print;
--- shape and dash say the same again.

local _ENV <const> = require "qlua.strict"

return [[
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#1a1d21;--soft:#555d66;--rule:#d9dcd8;
--grid:#e7e9e5;--full:#0072b2;--quant:#d55e00;--good:#1f7a4d;--amber:#8a5a00;--amberbg:#fff5dc;--mark:#ffe08a;
--markink:#1a1d21}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1c2024;--ink:#e8eaec;--soft:#a5adb5;
--rule:#353b41;--grid:#2a2f34;--good:#5cc492;--amber:#f0b84a;--amberbg:#2e2512;--mark:#6b5200;--markink:#fff}}
*,::before{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,
"Noto Sans","DejaVu Sans",sans-serif;overflow-wrap:break-word}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:1.9rem;line-height:1.2;margin:.1em 0 .35em;letter-spacing:-.015em;text-wrap:balance}
h2{font-size:1.3rem;margin:2.6rem 0 .8rem;letter-spacing:-.01em}
h3{font-size:1.02rem;margin:0}
h4{font-size:.86rem;margin:.4rem 0}
p{margin:.4rem 0}
a{color:inherit}
code,pre,kbd{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86em}
.kicker{font-size:.78rem;letter-spacing:.08em;text-transform:uppercase;color:var(--soft);margin:0}
.note,.chart figcaption p{color:var(--soft);font-size:.86rem}
.vh{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.skip{position:absolute;left:-999px;top:0;background:var(--ink);color:var(--paper);padding:.6em 1em;z-index:2}
.skip:focus{left:12px;top:12px}
:focus-visible{outline:3px solid var(--full);outline-offset:2px;border-radius:3px}
@media (prefers-color-scheme:dark){:focus-visible{outline-color:#66b8e8}}
.num,.n,td{font-variant-numeric:tabular-nums}
.num{white-space:nowrap}
nav{font-size:.86rem;margin:.6rem 0 0}nav a{margin-right:1.1em;white-space:nowrap}
.verdict{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:28px;background:var(--card);
border:1px solid var(--rule);border-left:6px solid var(--v,var(--soft));border-radius:10px;padding:22px 26px;
margin-top:1.1rem}
.verdict.quantize{--v:var(--good)}.verdict.dont{--v:#b3261e}.verdict.open{--v:#8b8f94}
.verdict h2{margin:0;font-size:2rem;line-height:1.15;letter-spacing:-.02em}
.verdict .why{font-size:1.08rem;margin:.35rem 0 .9rem}
.verdict ul{margin:0;padding-left:1.1em}.verdict li{margin:.28rem 0}
.rule{font-size:.84rem;color:var(--soft);border-left:1px solid var(--rule);padding-left:24px}
.rule dt{font-weight:600;color:var(--ink);margin-top:.5em}.rule dd{margin:0}.rule dl{margin:0}
.cards{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:18px;margin-top:18px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 20px 12px}
.card h2{margin:0;font-size:.78rem;letter-spacing:.08em;text-transform:uppercase;color:var(--soft);
font-weight:600}
.card .fig{font-size:2rem;line-height:1.2;font-weight:650;letter-spacing:-.02em;margin:.1rem 0}
.card .fig small{font-size:1rem;font-weight:400;letter-spacing:0;color:var(--soft)}
.card p{font-size:.88rem;margin:.15rem 0}.card svg{margin-top:8px}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px}
.chart{background:var(--card);border:1px solid var(--rule);border-radius:10px;margin:0;
padding:18px 20px 12px;min-width:0}
.wide{grid-column:1/-1}
.chart:not(.wide):not(.chart:not(.wide)+.chart):is(:last-child,:has(+.wide)){grid-column:1/-1}
.chart>svg,.side>svg{margin-top:10px}.chart>svg{max-width:640px;margin-left:auto;margin-right:auto}
.side{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:28px;align-items:start}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--ink);font-family:inherit}
svg .a{fill:var(--soft);font-size:11px}svg .k{font-weight:600}svg .v{font-size:11px;
font-variant-numeric:tabular-nums}
svg .oom{font-size:10px;font-weight:600}
.halo{paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.g{stroke:var(--grid)}.chance,.lead{stroke:var(--soft);stroke-dasharray:2 3}.lead{stroke-width:.7}
.m1{fill:var(--full)}.m2{fill:var(--quant)}
.m1.halo,.m2.halo{stroke-width:2px;stroke:var(--card)}
.hollow{fill:none;stroke:var(--full);stroke-width:1.3}
.l1,.l2,.w1,.w2,.x1,.x2{fill:none;stroke:var(--full);stroke-width:2}.l2,.w2,.x2{stroke:var(--quant)}
.l2{stroke-dasharray:6 3}.w1,.w2{stroke-width:1.6}
.b1,.d1{fill:var(--full);opacity:.18}.b2{fill:var(--quant);opacity:.2}.d2{fill:var(--quant);opacity:.42}
.band{fill:var(--good);opacity:.14}
.dots{fill:none;stroke:var(--quant);stroke-linecap:round;opacity:.42}
.s11{fill:var(--full)}.s12{fill:var(--full);opacity:.6}.s13{fill:var(--full);opacity:.3}
.s21{fill:var(--quant)}.s22{fill:var(--quant);opacity:.6}.s23{fill:var(--quant);opacity:.3}
.s31{fill:var(--soft)}.s32{fill:var(--soft);opacity:.6}.s33{fill:var(--soft);opacity:.3}
.s11.not,.s12.not,.s13.not{fill:none;opacity:1;stroke:var(--full);stroke-dasharray:3 2}
.s21.not,.s22.not,.s23.not{fill:none;opacity:1;stroke:var(--quant);stroke-dasharray:3 2}
.peak{stroke:var(--ink);stroke-width:1.6}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.84rem;width:100%;margin:.6rem 0}
th,td{padding:.28em .7em;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600}tbody th{font-weight:500}
th:first-child,td:first-child{padding-left:0}
.n{text-align:right}td.n{white-space:nowrap}
caption{text-align:left;font-weight:600;padding-bottom:.3rem}
summary{cursor:pointer}
.data{margin-top:10px;border-top:1px solid var(--rule);padding-top:8px}
.data>summary{font-size:.84rem;color:var(--soft)}
.pairs{display:grid;gap:16px}
.two td,.two th{border:0;padding:.45em .8em}.two td{width:36%;border:2px solid var(--card);border-radius:4px}
.two small{color:inherit}.two b{font-size:1.1rem}
.two thead td{background:none}.two th{vertical-align:middle}
.t0{background:color-mix(in srgb,var(--soft) calc(var(--s)*34%),transparent)}
.t1{background:color-mix(in srgb,var(--full) calc(12% + var(--s)*70%),transparent)}
.t2{background:color-mix(in srgb,var(--quant) calc(12% + var(--s)*70%),transparent)}
.big{display:flex;flex-wrap:wrap;gap:12px 36px;
font-size:2rem;font-weight:650;letter-spacing:-.02em;margin:.5rem 0}
.big span span{display:block}.big small{font-size:.9rem;font-weight:400;letter-spacing:0;color:var(--soft)}
.c1{border-left:4px solid var(--full);padding-left:12px}.c2{border-left:4px dashed var(--quant);
padding-left:12px}
.box{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 22px}
.box.amber{border-color:var(--amber)}
.box h3{margin-top:1.1rem}.box .data{margin-top:2px;border:0;padding:0}
.checks{list-style:none;margin:.4rem 0;padding:0;font-size:.9rem}
.checks li{padding:.38em 0 .38em 1.9em;position:relative;border-bottom:1px solid var(--rule)}
.checks li:last-child{border:0}
.checks li::before{content:"·";position:absolute;left:.35em;font-weight:700}
.checks .ok::before{content:"✓";color:var(--good)}
.checks .bad{background:var(--amberbg);border-radius:5px}.checks .bad::before{content:"▲";color:var(--amber)}
.banner{background:var(--amberbg);border:1px solid var(--amber);border-radius:8px;padding:.7em 1em;
margin-top:1rem}
.banner b,.bad b{color:var(--amber)}
.browser fieldset{border:0;margin:.6rem 0;padding:0;display:contents}
.browser legend{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.browser input{position:absolute;opacity:0}
.browser label{display:inline-block;border:1px solid var(--rule);border-radius:99px;padding:.22em .85em;
margin:0 .4em .5em 0;
font-size:.86rem;cursor:pointer;background:var(--card)}
.browser input:checked+label{background:var(--ink);color:var(--paper);border-color:var(--ink)}
.browser input:focus-visible+label{outline:3px solid var(--full);outline-offset:2px}
.browser:has(#f-quantized:checked) .q:not(.q-quantized){display:none}
.browser:has(#f-full:checked) .q:not(.q-full){display:none}
.browser:has(#f-differ:checked) .q:not(.q-differ){display:none}
.browser:has(#f-wrong:checked) .q:not(.q-wrong){display:none}
.browser:has(#f-right:checked) .q:not(.q-right){display:none}
.list{margin-top:.4rem}
.q{background:var(--card);border:1px solid var(--rule);border-radius:7px;margin:5px 0;padding:0 14px}
.q[open]{padding-bottom:12px}
.q>summary{display:flex;gap:.8em;align-items:baseline;padding:.5em 0;font-size:.9rem;list-style:none}
.q>summary::-webkit-details-marker{display:none}
.q>summary::before{content:"";flex:none;width:9px;height:9px;border-radius:50%;background:var(--soft);
opacity:.5}
.q-quantized>summary::before{background:var(--quant);opacity:1;border-radius:0}
.q-full>summary::before{background:var(--full);opacity:1}
.q-differ>summary::before,.q-wrong>summary::before{background:none;border:2px solid var(--soft)}
.qn{flex:none;color:var(--soft);font-size:.8rem}.qt{flex:1;min-width:0}
.qa{flex:none;white-space:nowrap;font-size:.8rem;color:var(--soft);font-variant-numeric:tabular-nums}
.gold{background:color-mix(in srgb,var(--good) 14%,transparent)}
.p1,.p2{font-weight:700}.p1 i,.qa .i1{color:var(--full)}.p2 i,.qa .i2{color:var(--quant)}i{font-style:normal}
.full{white-space:pre-wrap}
.two-up{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:16px}
.o1{border-left:4px solid var(--full);padding-left:12px}.o2{border-left:4px dashed var(--quant);
padding-left:12px}
pre{white-space:pre-wrap;margin:.3rem 0;max-height:26em;overflow:auto}
mark{background:var(--mark);color:var(--markink);border-radius:2px;padding:0 .1em}
.again dt{color:var(--soft);font-size:.84rem;margin-top:.7em}.again dd{margin:0}
.again pre{background:var(--paper);border:1px solid var(--rule);border-radius:6px;padding:.7em 1em}
footer{color:var(--soft);font-size:.84rem;padding-top:2.4rem;padding-bottom:3rem}
@media (max-width:820px){.verdict,.charts,.side{grid-template-columns:minmax(0,1fr)}
.rule{border-left:0;border-top:1px solid var(--rule);padding:14px 0 0}}
@media (max-width:640px){main,header,footer{padding-left:14px;padding-right:14px}.cards,.two-up{
grid-template-columns:minmax(0,1fr)}.verdict{padding:16px}.chart{padding:14px 12px 8px}h1{font-size:1.5rem}
.verdict h2{font-size:1.6rem}svg text{font-size:13px}
svg .a,svg .v{font-size:12px}.q>summary{flex-wrap:wrap}.qt{flex-basis:100%;order:3}.two td,
.two th{padding:.35em .4em}}
@media print{:root{color-scheme:light;--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#bbb;
--grid:#ddd;--good:#1f7a4d;
--amber:#8a5a00;--amberbg:#fff5dc;--mark:#ffe08a;--markink:#000}body{font-size:10.5pt}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
main,header,footer{max-width:none;padding:0}nav,.skip,.browser fieldset,.browser label{display:none}
.chart,.card,.verdict,.box,.q,tr{break-inside:avoid}h2,h3{break-after:avoid}pre{max-height:none}
.verdict{grid-template-columns:minmax(0,3fr) minmax(0,2fr)}
.cards{grid-template-columns:repeat(3,minmax(0,1fr))}
.charts,.side{grid-template-columns:repeat(2,minmax(0,1fr))}.data:not([open]){display:none}}
]]

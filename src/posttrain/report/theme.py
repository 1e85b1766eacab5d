"""Colours, the style sheet and the optional script of the page.

The palette is told apart with the common forms of colour blindness (after Okabe and Ito, darkened
or lightened until every series stands out from its background at least 3:1 and all text 4.5:1;
tests/report measures this). Nothing is said by colour alone: names, dashes or numbers repeat it.
"""

SERIES = 6  # colours for models beside the reference; then they repeat with dashed lines
HEAT = 7  # steps of the heat map, 0 the quietest

PALETTES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#f6f5f2",
        "card": "#ffffff",
        "ink": "#1c1b19",
        "soft": "#595751",
        "hair": "#e2e0da",
        "grid": "#eeece7",
        "mark": "#fff0c2",
        "accent": "#005f99",
        "s0": "#3d3b37",
        "s1": "#0072b2",
        "s2": "#c44e00",
        "s3": "#008562",
        "s4": "#b0568c",
        "s5": "#9a6a00",
        "s6": "#3f8fc0",
        "h0": "#fdf1e3",
        "h1": "#fbdcb9",
        "h2": "#f7bd80",
        "h3": "#ee9549",
        "h4": "#cf6415",
        "h5": "#9c4308",
        "h6": "#662a05",
        "t0": "#1c1b19",
        "t1": "#1c1b19",
        "t2": "#1c1b19",
        "t3": "#1c1b19",
        "t4": "#000000",
        "t5": "#ffffff",
        "t6": "#ffffff",
    },
    "dark": {
        "page": "#141413",
        "card": "#1e1d1c",
        "ink": "#f0eee9",
        "soft": "#b3b0a8",
        "hair": "#3a3835",
        "grid": "#2b2a28",
        "mark": "#5a4713",
        "accent": "#7cc0ee",
        "s0": "#d6d3cb",
        "s1": "#4fa8e0",
        "s2": "#f08a4b",
        "s3": "#35bf92",
        "s4": "#e08fbe",
        "s5": "#e0b04a",
        "s6": "#9ad0f0",
        "h0": "#2a211a",
        "h1": "#46301c",
        "h2": "#6b421c",
        "h3": "#96591c",
        "h4": "#c4741f",
        "h5": "#ec9c4a",
        "h6": "#fcd29c",
        "t0": "#f0eee9",
        "t1": "#f0eee9",
        "t2": "#ffffff",
        "t3": "#ffffff",
        "t4": "#000000",
        "t5": "#1c1b19",
        "t6": "#1c1b19",
    },
}


def _variables(mode: str) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in PALETTES[mode].items())


_CLASSES = "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(SERIES + 1)) + "".join(
    f".h{i}{{fill:var(--h{i});background:var(--h{i})}}.t{i}{{fill:var(--t{i})}}"
    for i in range(HEAT)
)

_SHEET = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:976px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:clamp(1.55rem,1.1rem + 1.9vw,2.3rem);line-height:1.2;letter-spacing:-.018em;
font-weight:650;margin:.3em 0 .5em;text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;font-weight:650;margin:0 0 .2em;overflow-wrap:anywhere}
h3{font-size:1rem;font-weight:600;margin:1.8em 0 .2em;overflow-wrap:anywhere}
p{margin:.3em 0 .8em;max-width:46em;overflow-wrap:anywhere}
.eyebrow{color:var(--soft);font-size:.85rem;margin:0}
.lead{font-size:1.1rem}
.lead li{margin:.35em 0;max-width:46em;overflow-wrap:anywhere}
.lead ul,ul.lead{padding-left:1.1em;margin:.5em 0}
.soft,figcaption{color:var(--soft)}
section{background:var(--card);border:1px solid var(--hair);border-radius:12px;
padding:24px;margin:20px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:24px 0}
.tiles div{background:var(--card);border:1px solid var(--hair);border-radius:12px;padding:14px 18px}
.tiles dt{color:var(--soft);font-size:.85rem}
.tiles dd{margin:0}
.tiles .big{display:block;font-size:1.75rem;line-height:1.25;font-weight:600;letter-spacing:-.01em;
overflow-wrap:anywhere}
.tiles small{color:var(--soft);font-size:.85rem}
figure{margin:12px 0 0}
figcaption{font-size:.9rem;margin-bottom:14px;max-width:52em}
svg{display:block;max-width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--ink);font-family:inherit;font-variant-numeric:tabular-nums}
svg .tick,svg .axis{fill:var(--soft)}
svg .label{paint-order:stroke;stroke:var(--card);stroke-width:4px}
svg .cell{font-size:11px}svg .small{font-size:10px}
.grid{stroke:var(--grid)}.base{stroke:var(--hair)}.zero{stroke:var(--soft);stroke-dasharray:3 3}
.stroke{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round;stroke-linecap:round}
.dashed.stroke{stroke-dasharray:6 4}
.fill{fill:var(--c)}.ring{stroke:var(--card);stroke-width:2}
.dashed.ring{fill:var(--card);stroke:var(--c);stroke-width:2.5}
.band{fill:var(--c);opacity:.16}.faint{opacity:.4}
.hit{fill:transparent}.hit:hover{fill:var(--ink);fill-opacity:.06}
.bar:hover,rect.heat:hover{stroke:var(--ink);stroke-width:1.5}
.narrow{display:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:0 0 10px;
font-size:.88rem}
.legend li,.name{overflow-wrap:anywhere}
.key{display:inline-block;width:.72em;height:.72em;border-radius:50%;background:var(--c);
margin-right:.5em}
.key.dashed{background:none;border:2.5px dashed var(--c)}
.ramp{display:flex;align-items:center;gap:2px;font-size:.82rem;color:var(--soft);margin:0 0 12px;
flex-wrap:wrap}
.ramp i{width:26px;height:12px;border-radius:2px;outline:1px solid var(--hair);outline-offset:-1px}
.ramp span{margin:0 8px}.ramp span:first-child{margin-left:0}
.scroll{overflow-x:auto;margin:12px -24px 0;padding:0 24px}
.scroll:focus-visible,summary:focus-visible,.text:focus-visible,th button:focus-visible{
outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:8px 10px;text-align:right;border-bottom:1px solid var(--hair);vertical-align:middle;
white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:.84rem;vertical-align:bottom;line-height:1.3;white-space:normal}
th:first-child{text-align:left;padding-left:0}.left{text-align:left}
th svg{margin:4px -10px 0}td svg{margin:0 -10px}.mid{text-align:center}
td.left,tbody th{white-space:normal;overflow-wrap:anywhere}
tbody th{font-weight:600;min-width:12em}
tbody th small{display:block;font-weight:400;color:var(--soft);font-size:.86em}
tbody tr:last-child>*{border-bottom:0}
td svg,th svg{display:inline-block;vertical-align:middle;max-width:none}
table.sort th:nth-child(-n+3){text-align:left}
th button{all:unset;cursor:pointer;text-decoration:underline dotted;text-underline-offset:3px}
details{margin-top:16px}
summary{cursor:pointer;color:var(--accent);width:fit-content;border-radius:4px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,270px),1fr));gap:14px;
margin:10px 0 0}
.prompt{border-left:3px solid var(--hair);padding-left:12px;color:var(--soft);white-space:pre-wrap;
unicode-bidi:plaintext}
.out{border:1px solid var(--hair);border-radius:8px;padding:12px 14px;min-width:0}
.out header{font-size:.86rem;font-weight:600;margin-bottom:6px}
.out header em{font-weight:400;font-style:normal;color:var(--soft);margin-left:.4em}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:26em;overflow-y:auto;font-size:.94rem;
unicode-bidi:plaintext}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:1px 0;
box-decoration-break:clone;-webkit-box-decoration-break:clone}
dl.facts{display:grid;grid-template-columns:minmax(8em,auto) 1fr;gap:8px 20px;margin:14px 0}
dl.facts dt{color:var(--soft)}dl.facts dt::first-letter{text-transform:uppercase}
dl.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
pre,code{font:.88em/1.5 ui-monospace,SFMono-Regular,Consolas,"Liberation Mono",monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--page);border-radius:8px;
padding:12px 14px;margin:12px 0}
.note{border-left:3px solid var(--s5);padding-left:14px;margin:18px 0 4px}
#tip{position:fixed;pointer-events:none;background:var(--ink);color:var(--card);font-size:.82rem;
line-height:1.4;padding:5px 9px;border-radius:6px;white-space:pre-line;max-width:300px;z-index:2;
overflow-wrap:anywhere}
@media screen and (max-width:859px){.ramp i{width:10px}
main{padding:24px 14px 40px}section{padding:18px 16px}.scroll{margin:12px -16px 0;padding:0 16px}
.wide{display:none}.narrow{display:block}.narrow svg{width:100%;max-width:420px;margin:0 auto}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tiles div{padding:12px 14px}
.tiles .big{font-size:1.4rem}
dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:10px}
tbody th{position:sticky;left:-16px;background:var(--card);padding-left:16px;margin-left:-16px}
tbody th{min-width:7.5em}
}
@media print{
body{background:none;font-size:10.5pt}main{max-width:none;padding:0}
section,.tiles div{border-color:#ccc;break-inside:auto}
figure,tr,.out,h2,h3,.tiles{break-inside:avoid}h2,h3{break-after:avoid}
.wide{display:block}.narrow{display:none}.scroll{overflow:visible}
.text{max-height:none}.tiles{grid-template-columns:repeat(4,1fr)}.tiles .big{font-size:16pt}
table{font-size:8pt}thead th{font-size:7.5pt}th,td{padding:5px}tbody th{min-width:7em}
td svg,th svg{width:150px;height:auto}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""

STYLE = (
    f":root{{color-scheme:light dark;{_variables('light')}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables('dark')}}}}}"
    f"{_CLASSES}{_SHEET}"
)

# Two comforts, neither needed: values of marks beside the pointer at once (without the script the
# browser shows the same <title> after a second), and tables sorted by a click on a heading.
SCRIPT = """
(()=>{
const tip=document.createElement('div');tip.id='tip';tip.hidden=true;document.body.append(tip);
for(const title of document.querySelectorAll('svg * > title')){
 const mark=title.parentNode,text=title.textContent;title.remove();
 mark.setAttribute('aria-label',text);
 mark.addEventListener('pointermove',e=>{tip.textContent=text;tip.hidden=false;
  const w=tip.offsetWidth,h=tip.offsetHeight;
  tip.style.left=Math.max(4,Math.min(e.clientX+14,innerWidth-w-8))+'px';
  tip.style.top=(e.clientY+h+24>innerHeight?e.clientY-h-12:e.clientY+16)+'px'});
 mark.addEventListener('pointerleave',()=>{tip.hidden=true});
}
const value=cell=>{const d=cell.querySelector('data');return d?+d.value:cell.textContent};
for(const table of document.querySelectorAll('table.sort'))
 table.querySelectorAll('thead th').forEach((head,column)=>{
  const button=document.createElement('button');button.append(...head.childNodes);
  head.append(button);
  button.addEventListener('click',()=>{
   const up=head.getAttribute('aria-sort')!=='ascending';
   table.querySelectorAll('thead th').forEach(h=>h.removeAttribute('aria-sort'));
   head.setAttribute('aria-sort',up?'ascending':'descending');
   const body=table.tBodies[0],rows=[...body.rows];
   rows.sort((a,b)=>{const x=value(a.cells[column]),y=value(b.cells[column]);
    return (x<y?-1:x>y?1:0)*(up?1:-1)});
   body.append(...rows)})});
})();
"""

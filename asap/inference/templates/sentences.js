const percent = x => (100*x).toFixed(1)+" %", engine = data.text && {...makeTokenizer(data.text.tokenizer), ...makeEncoder(data.text.encoder)};
const KINDS = {typed: "Typed here", own: "True of this scan by what ships with it", study: "Put to every scan", tried: "Tried: nobody says that it is there"};
const TITLES = {typed: "Typed", own: "Of this scan", study: "Of the study", tried: "Tried"};
function describe(s) { // plain sentences
  const out = [`${KINDS[s.kind]}.`, `k = ${s.k}: from the words alone the model predicts that this sentence needs ${s.k} of ${patchCount()} patches; the region is the ${s.k} patches most similar to it. Every sentence gets a region, also one that is not true.`];
  if (s.outside) out.push(`Of these, ${s.outside} beyond the edge of the scan, where the model sees air.`);
  if (s.hit !== undefined) out.push(`It points ${s.hit ? "into" : "beside"} the lesion; a guess would hit in ${percent(s.random_hit_rate)}; Dice of its region ${s.dice.toFixed(2)}.`);
  return out.join(" ");
}
function warn(s) {
  if (!s.unknown?.length) return "";
  return `Warning: the text encoder does not know ${s.unknown.map(w => `\u201c${w}\u201d`).join(", ")}: the reports that it was trained on do not use such words, so what is found for them means nothing.`;
}
function centre(n) { // of patch n, in millimetres
  const [, h, d] = scan.grid, ijk = [Math.floor(n/h/d), Math.floor(n/d) % h, n % d];
  return scan.patch_affine.slice(0, 3).map(r => r[0]*ijk[0]+r[1]*ijk[1]+r[2]*ijk[2]+r[3]);
}
function localize(text) { // a sentence as analyze_scan describes it; an Error says why it is none
  const ids = engine.ids(text), most = data.text.encoder.max_length-2;
  if (!ids.length) throw Error("Type a sentence, such as \u201cThere is pleural effusion.\u201d");
  if (ids.length > most) throw Error(`${ids.length} word pieces; the text encoder reads at most ${most}: type a shorter sentence.`);
  const found = engine.align(engine.sentence(ids), scan.values ??= floats(scan.embeds), scan.candidates), beyond = new Set(scan.outside);
  return {text, kind: "typed", ...found, outside: found.region.filter(p => beyond.has(p)).length, unknown: engine.unknown(text)};
}
function ask() {
  $("refused").textContent = "";
  try {
    const text = $("typed").value.trim(), same = scan.sentences.findIndex(s => s.text === text);
    if (same >= 0) return pick(same);
    scan.sentences.push(localize(text)); list(); pick(scan.sentences.length-1);
  } catch (e) { $("refused").textContent = e.message }
}
function list() { // a button a sentence, in groups
  $("list").replaceChildren(...Object.keys(TITLES).flatMap(kind => {
    const rows = [...scan.sentences.entries()].filter(([, s]) => s.kind === kind), h = document.createElement("h2"); h.textContent = TITLES[kind];
    return rows.length ? [h, ...rows.map(([j, s]) => button(j, s))] : [];
  }));
}
function button(j, s) {
  const b = document.createElement("button"), k = document.createElement("span"); b.dataset.sentence = j; b.onclick = () => pick(j);
  b.textContent = s.text; k.textContent = `k ${s.k}${s.hit === undefined ? "" : s.hit ? ", hit" : ", miss"}`; b.append(k);
  return b;
}
function pick(j) {
  const s = scan.shown = scan.sentences[j];
  nv.scene.crosshairPos = nv.mm2frac(centre(s.point)).map(v => Math.min(0.999, Math.max(0.001, v))); paintRegion(s);
  if (at.heat || number("heat")) paintHeat(s).catch(fail);
  $("said").textContent = `\u201c${s.text}\u201d`; $("about").textContent = describe(s); $("unknown").textContent = warn(s);
  document.querySelectorAll("#list button").forEach(b => b.setAttribute("aria-pressed", b.dataset.sentence === String(j)));
  history.replaceState(null, "", `#${encodeURIComponent(scan.name)}/${j}`); document.body.dataset.state = `${scan.name}/${j}`;
}

async function show(name, j) {
  scan = data.scans.find(s => s.name === name) ?? data.scans[0]; at = {};
  for (const v of [...nv.volumes]) nv.removeVolume(v);
  await layer("ct", scan.ct, {colormap: "gray"}); await layer("heat", scan.empty, {colormap: "inferno", cal_min: 1, cal_max: 255}); await layer("region", scan.empty, {});
  if (scan.lesion) await layer("lesion", scan.lesion, {});
  at.region.setColormapLabel(colour(51, 221, 255)); at.lesion?.setColormapLabel(colour(255, 80, 80)); $("marked").hidden = !scan.lesion; $("scan").value = scan.name;
  const titles = {own: "Of this scan", study: "Of the study", tried: "Tried"};
  $("list").replaceChildren(...scan.sentences.flatMap((s, i, all) => {
    const b = document.createElement("button"), k = document.createElement("span"), h = document.createElement("h2"); h.textContent = titles[s.kind];
    b.textContent = s.text; k.textContent = `k ${s.k}${s.hit === undefined ? "" : s.hit ? ", hit" : ", miss"}`; b.append(k); b.onclick = () => pick(i);
    return i === 0 || all[i-1].kind !== s.kind ? [h, b] : [b] }));
  opacity(); pick(j >= 0 && j < scan.sentences.length ? j : 0);
}
function opacity() {
  [at.ct.cal_min, at.ct.cal_max] = $("window").value.split(",").map(Number);
  for (const n of ["heat", "region", "lesion"]) if (at[n]) at[n].opacity = number(n);
  nv.setCrosshairWidth($("lines").checked ? 1 : 0); nv.updateGLVolume();
}
const asked = () => { const [name, j] = decodeURIComponent(location.hash.slice(1)).split("/"); return [name, Number(j ?? 0)] };

async function start() {
  if (!document.createElement("canvas").getContext("webgl2")) return fail("This browser offers no WebGL2, which the three planes need. Switch on hardware acceleration or open the file in another browser; the heat maps on index.html show the same sentences.");
  nv = new niivue.Niivue({logLevel: "error", dragAndDropEnabled: false, isColorbar: false, show3Dcrosshair: false, backColor: [0, 0, 0, 1], crosshairColor: [1, 0.85, 0.3, 0.8], multiplanarShowRender: niivue.SHOW_RENDER.NEVER, isRadiologicalConvention: true});
  await nv.attachToCanvas($("gl")); nv.setSliceType(niivue.SLICE_TYPE.MULTIPLANAR);
  for (const s of data.scans) $("scan").add(new Option(s.what, s.name));
  $("scan").onchange = () => show($("scan").value, 0).catch(fail); window.onhashchange = () => { if (document.body.dataset.state !== location.hash.slice(1)) show(...asked()).catch(fail) };
  for (const n of ["heat", "region", "lesion", "window", "lines"]) $(n).oninput = opacity;
  await show(...asked());
}
start().catch(fail);

const chosenWindow = () => $("window").value.split(",").map(Number);
async function show(name, j) {
  const [cal_min, cal_max] = chosenWindow();
  scan = data.scans.find(s => s.name === name) ?? data.scans[0]; at = {};
  for (const v of [...nv.volumes]) nv.removeVolume(v);
  await layer("ct", scan.ct, {colormap: "gray", cal_min, cal_max});
  if (scan.lesion) await layer("lesion", scan.lesion, {opacity: number("lesion")}, color(255, 80, 80));
  at.patches = await load("patches", scan.patches); at.ras = at.patches.img2RAS(); nv.createEmptyDrawing();
  $("marked").hidden = !scan.lesion; $("scan").value = scan.name;
  list(); pick(j >= 0 && j < scan.sentences.length ? j : 0);
}
const change = { // of a control
  region: () => nv.setDrawOpacity(number("region")),
  heat: () => paintHeat(scan.shown).catch(fail),
  lesion: () => { at.lesion.opacity = number("lesion"); nv.updateGLVolume() },
  window: () => { [at.ct.cal_min, at.ct.cal_max] = chosenWindow(); nv.updateGLVolume() },
  lines: () => nv.setCrosshairWidth($("lines").checked ? 1 : 0),
};
const addressed = () => { const [name, j] = location.hash.slice(1).split("/").map(decodeURIComponent); return [name, Number(j ?? 0)] };

async function start() {
  if (!document.createElement("canvas").getContext("webgl2")) return fail("This browser offers no WebGL2, which the three planes need. Switch on hardware acceleration or open the file in another browser.");
  nv = new niivue.Niivue({logLevel: "error", dragAndDropEnabled: false, isColorbar: false, show3Dcrosshair: false, backColor: [0, 0, 0, 1], crosshairColor: [1, 0.85, 0.3, 0.8], multiplanarShowRender: niivue.SHOW_RENDER.NEVER, isRadiologicalConvention: true});
  await nv.attachToCanvas($("gl")); nv.setSliceType(niivue.SLICE_TYPE.MULTIPLANAR);
  nv.setDrawColormap(color(51, 221, 255)); change.region(); change.lines();
  for (const s of data.scans) $("scan").add(new Option(s.what, s.name));
  $("scan").onchange = () => show($("scan").value, 0).catch(fail); window.onhashchange = () => { if (document.body.dataset.state !== addressed().join("/")) show(...addressed()).catch(fail) };
  for (const [id, apply] of Object.entries(change)) $(id).oninput = apply;
  $("ask").hidden = !engine; $("ask").onsubmit = e => { e.preventDefault(); ask() };
  await show(...addressed());
}
start().catch(fail);

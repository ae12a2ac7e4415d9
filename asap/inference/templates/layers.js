const data = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
const color = (r, g, b) => ({R: [0, r], G: [0, g], B: [0, b], A: [0, 255], I: [0, 1], labels: ["", ""]});
const number = id => Number($(id).value), fail = e => { $("problem").style.display = "block"; $("problem").textContent = e; document.body.dataset.state = "failed" };
let nv, scan, at = {}; // volumes by name: ct, lesion, heat; patches: 1 + the patch of each voxel, 0: none; ras: the same along R, A, S
const patchCount = () => scan.grid[0]*scan.grid[1]*scan.grid[2];
function paint(out, patches, value) { // value: patch -> 0..255
  const table = new Uint8Array(patchCount()+1);
  for (let n = 0; n < table.length-1; n++) table[n+1] = value(n);
  for (let i = 0; i < out.length; i++) out[i] = table[patches[i]];
}
function paintRegion(s) { // NiiVue's drawing: one texture, quickly replaced
  const region = new Set(s.region);
  paint(nv.drawBitmap, at.ras, n => region.has(n) ? 1 : 0); nv.refreshDrawing();
}
async function paintHeat(s) { // slow on a large scan: only where it is shown
  at.heat ??= await layer("heat", scan.patches, {colormap: "inferno", cal_min: 1, cal_max: 255, opacity: 0});
  const heat = s.heat.filter(v => v > -1).sort((x, y) => x-y), low = heat[Math.floor(0.05*heat.length)], high = Math.max(...s.heat);
  paint(at.heat.img, at.patches.img, n => Math.max(0, Math.min(255, 255*(s.heat[n]-low)/(high-low+1e-9))));
  at.heat.opacity = number("heat"); nv.updateGLVolume();
}
const load = (name, base64, how = {}) => niivue.NVImage.loadFromBase64({base64, name: name+".nii.gz", colorbarVisible: false, ...how});
async function layer(name, base64, how, label) {
  at[name] = await load(name, base64, how);
  if (label) at[name].setColormapLabel(label);
  nv.addVolume(at[name]);
  return at[name];
}

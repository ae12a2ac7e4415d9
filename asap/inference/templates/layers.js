const data = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
const colour = (r, g, b) => ({R: [0, r], G: [0, g], B: [0, b], A: [0, 255], I: [0, 1], labels: ["", ""]});
const number = id => Number($(id).value), fail = e => { $("problem").style.display = "block"; $("problem").textContent = e; document.body.dataset.state = "failed" };
let nv, scan, at = {}; // volumes by name: ct, heat, region, lesion
function paint(volume, value) { // value: patch -> 0..255
  const [W, H, D] = scan.size, [a, b, c] = scan.patch, [, h, d] = scan.grid;
  for (let z = 0, i = 0; z < D; z++) for (let y = 0; y < H; y++) for (let x = 0; x < W; x++, i++)
    volume.img[i] = value(((x/a | 0)*h+(y/b | 0))*d+(z/c | 0));
}
async function layer(name, base64, how) {
  at[name] = await niivue.NVImage.loadFromBase64({base64, name: name+".nii.gz", colorbarVisible: false, ...how});
  nv.addVolume(at[name]);
}

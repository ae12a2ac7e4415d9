const yes = (t, a, b) => t ? a : b, percent = x => (100*x).toFixed(1)+" %";
function words(s) {
  const kinds = {own: "true of this scan by what ships with it", study: "put to every scan", tried: "tried: nobody says that it is there"};
  const hit = s.hit === undefined ? "" : ` It points ${yes(s.hit, "<b>into</b> the lesion", "<b>beside</b> the lesion")}; a guess would hit in ${percent(s.chance)}; Dice of its region ${s.dice.toFixed(2)}.`;
  return `<i></i><p class="soft">${kinds[s.kind]}. Best ${s.k} of ${scan.grid[0]*scan.grid[1]*scan.grid[2]} patches.${s.outside ? ` Of these, ${s.outside} beyond the edge of the scan, where the model sees air.` : ""}${hit}</p>`;
}
function centre(n) { // of patch n, in millimetres
  const [, h, d] = scan.grid, ijk = [Math.floor(n/h/d), Math.floor(n/d) % h, n % d].map((v, i) => (v+0.5)*scan.patch[i]-0.5);
  return scan.affine.slice(0, 3).map(r => r[0]*ijk[0]+r[1]*ijk[1]+r[2]*ijk[2]+r[3]);
}
function pick(j) {
  const s = scan.sentences[j], low = [...s.heat].sort((x, y) => x-y)[Math.floor(0.05*s.heat.length)], high = Math.max(...s.heat), region = new Set(s.region);
  paint(at.region, n => region.has(n) ? 1 : 0); paint(at.heat, n => Math.max(0, Math.min(255, 255*(s.heat[n]-low)/(high-low+1e-9))));
  nv.scene.crosshairPos = nv.mm2frac(centre(s.point)).map(v => Math.min(0.999, Math.max(0.001, v))); nv.updateGLVolume();
  $("said").innerHTML = words(s); $("said").querySelector("i").textContent = `\u201c${s.text}\u201d`;
  document.querySelectorAll("#list button").forEach((b, i) => b.setAttribute("aria-pressed", i === j));
  history.replaceState(null, "", `#${scan.name}/${j}`); document.body.dataset.state = `${scan.name}/${j}`;
}

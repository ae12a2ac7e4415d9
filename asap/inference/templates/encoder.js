// The text encoder and the alignment of asap.inference.portable, in double precision
const bytes = base64 => Uint8Array.from(atob(base64), c => c.charCodeAt(0));
const floats = base64 => new Float32Array(bytes(base64).buffer);
const CONTROL = /[\p{Cc}\p{Cf}\p{Co}\ufffd]/u, PUNCTUATION = "!-\\/:-@\\[-`{-~\\p{P}";
const CJK = /[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{2a6df}\u{2a700}-\u{2b81f}\u{2b920}-\u{2ceaf}\u{2f800}-\u{2fa1f}]/gu;
const PIECES = new RegExp(`[${PUNCTUATION}]|[^\\s${PUNCTUATION}]+`, "gu"), WORDS = /[\p{L}\p{N}_]+|[^\p{L}\p{N}_\p{Zs}\x00-\x7f\x85\u2028\u2029]+/gu;

function makeTokenizer(t) { // of export_tokenizer
  const ids = new Map(t.vocab.map((piece, id) => [piece, id]));
  const special = new RegExp(`(${t.special.map(s => s.replace(/[^\w]/g, "\\$&")).join("|")})`);
  function normalize(text) { // BertNormalizer
    let s = text;
    if (t.clean_text) s = [...s].filter(c => /[\t\n\r]/.test(c) || !CONTROL.test(c)).join("").replace(/\s/gu, " ");
    if (t.handle_chinese_chars) s = s.replace(CJK, " $& ");
    if (t.strip_accents) s = s.normalize("NFD").replace(/\p{Mn}/gu, "");
    return t.lowercase ? [...s].map(c => c.toLowerCase()).join("") : s;
  }
  function split(word) { // WordPiece: the longest piece first
    const letters = [...word], out = [];
    if (letters.length > t.max_chars) return [t.unknown];
    for (let start = 0, end; start < letters.length; start = end) {
      const piece = () => (start ? t.prefix : "")+letters.slice(start, end).join("");
      for (end = letters.length; end > start && !ids.has(piece()); end--);
      if (end === start) return [t.unknown];
      out.push(piece());
    }
    return out;
  }
  const pieces = text => text.split(special).flatMap((part, i) => i % 2 ? [part] : (normalize(part).match(PIECES) ?? []).flatMap(split));
  const known = word => (p => !p.includes(t.unknown) && (p.length === 1 || !t.by_sentence))(pieces(word));
  return {
    ids: text => pieces(text).map(p => ids.get(p)),
    unknown: text => [...new Set(text.match(WORDS) ?? [])].filter(word => !known(word)),
  };
}

function erf(x) { // a series of positive terms
  const a = Math.abs(x);
  if (a > 6) return Math.sign(x);
  let term = a, sum = a;
  for (let n = 1; term > 1e-17*sum; n++) sum += term *= 2*a*a/(2*n+1);
  return Math.sign(x)*2/Math.sqrt(Math.PI)*Math.exp(-a*a)*sum;
}
const gelu = x => x.map(v => v*(1+erf(v/Math.SQRT2))/2), sigmoid = x => 1/(1+Math.exp(-x));
function unit(x) { const norm = Math.max(Math.sqrt(x.reduce((s, v) => s+v*v, 0)), 1e-12); return x.map(v => v/norm) }

function makeEncoder(e) { // of export_encoder
  const all = floats(e.weights), w = {};
  let at = 0;
  for (const [name, size] of e.names) { w[name] = all.subarray(at, at+size); at += size }
  function linear(x, name) { // (n,in) -> (n,out)
    const weight = w[name+".weight"], bias = w[name+".bias"], out = bias.length, size = weight.length/out, y = new Float64Array(x.length/size*out);
    for (let i = 0; i < y.length; i++) {
      const row = (i/out | 0)*size, column = i%out*size;
      let sum = bias[i%out];
      for (let c = 0; c < size; c++) sum += x[row+c]*weight[column+c];
      y[i] = sum;
    }
    return y;
  }
  function norm(x, name, eps) { // of each row
    const scale = w[name+".weight"], shift = w[name+".bias"], n = scale.length, y = new Float64Array(x.length);
    for (let start = 0; start < x.length; start += n) {
      const row = x.subarray(start, start+n), mean = row.reduce((s, v) => s+v, 0)/n;
      const deviation = Math.sqrt(row.reduce((s, v) => s+(v-mean)**2, 0)/n+eps);
      for (let c = 0; c < n; c++) y[start+c] = (row[c]-mean)/deviation*scale[c]+shift[c];
    }
    return y;
  }
  const add = (x, y) => x.map((v, i) => v+y[i]);
  function attend(x, name, real) {
    const [q, k, v] = ["query", "key", "value"].map(part => linear(x, `${name}.self.${part}`)), size = e.dim/e.heads, y = new Float64Array(x.length);
    for (let h = 0; h < e.dim; h += size) for (let i = 0; i < real.length; i++) {
      const score = real.map((is, j) => { let s = 0; for (let c = h; c < h+size; c++) s += q[i*e.dim+c]*k[j*e.dim+c]; return is ? s/Math.sqrt(size) : -Infinity });
      const most = Math.max(...score), weight = score.map(s => Math.exp(s-most)), sum = weight.reduce((s, v) => s+v, 0);
      for (let j = 0; j < real.length; j++) for (let c = h; c < h+size; c++) y[i*e.dim+c] += weight[j]/sum*v[j*e.dim+c];
    }
    return norm(add(linear(y, `${name}.output.dense`), x), `${name}.output.LayerNorm`, e.eps);
  }
  function hidden(ids) { // (L,) -> (L,dim)
    const real = ids.map(id => id !== e.pad), [word, position, type] = ["word", "position", "token_type"].map(n => w[`embeddings.${n}_embeddings.weight`]);
    let x = Float64Array.from({length: ids.length*e.dim}, (_, i) => word[ids[i/e.dim | 0]*e.dim+i%e.dim]+position[i]+type[i%e.dim]);
    x = norm(x, "embeddings.LayerNorm", e.eps);
    for (let n = 0; n < e.layers; n++) {
      const name = `encoder.layer.${n}`;
      x = attend(x, `${name}.attention`, real);
      const wide = gelu(linear(x, `${name}.intermediate.dense`));
      x = norm(add(linear(wide, `${name}.output.dense`), x), `${name}.output.LayerNorm`, e.eps);
    }
    return x;
  }
  function sentence(ids) { // mean of the pieces, unit norm
    const x = hidden([e.cls, ...ids, e.sep]), mean = new Float64Array(e.dim);
    for (let i = e.dim; i < x.length-e.dim; i++) mean[i%e.dim] += x[i]/ids.length;
    return unit(mean);
  }
  function regionSize(feature, patches) { // as AlignmentHead.predict_k
    const logit = e.region_size === "fixed" ? 0 : linear(feature, "k_head")[0];
    if (e.region_size === "released") return Math.min(2**Math.trunc(3*sigmoid(logit)+4), patches);
    return 1+(Math.max(1, e.max_k_ratio*patches)-1)*sigmoid(4*logit+e.init_k_logit);
  }
  const halfToEven = x => x%1 === 0.5 ? 2*Math.round(x/2) : Math.round(x);
  function align(feature, embeds, candidates) { // embeds: (N,shared dim); candidates: patches that may be selected, or null
    const text = unit(linear(norm(gelu(linear(feature, "text_proj.0")), "text_proj.2", 1e-6), "text_proj.3")), n = embeds.length/text.length;
    const heat = Array.from({length: n}, (_, p) => { let s = 0; for (let c = 0; c < text.length; c++) s += text[c]*embeds[p*text.length+c]; return s });
    const allowed = candidates ? new Set(candidates) : null, ranked = heat.map((_, p) => p).filter(p => !allowed || allowed.has(p)).sort((a, b) => heat[b]-heat[a] || a-b);
    const k = halfToEven(regionSize(feature, n)), region = ranked.slice(0, Math.max(1, k)).sort((a, b) => a-b);
    return {k, region, heat: allowed ? heat.map((v, p) => allowed.has(p) ? v : -1) : heat, point: ranked[0]};
  }
  return {sentence, align};
}

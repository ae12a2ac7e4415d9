// A page opened from disk may not start a worker, which the search needs: run it in a frame instead.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe"); frame.hidden = true; document.body.append(frame);
    this.scope = frame.contentWindow; this.waiting = [];
    this.scope.postMessage = data => { const e = new MessageEvent("message", {data}); this.dispatchEvent(e); this.onmessage?.(e) };
    this.scope.importScripts = (...urls) => Promise.all(urls.map(u => this.load(u)));
    this.load(url).then(() => { const late = this.waiting; this.waiting = null; late.forEach(d => this.postMessage(d)) });
  }
  load(url) { return new Promise((done, fail) => { const s = this.scope.document.createElement("script"); s.src = url; s.onload = done; s.onerror = fail; this.scope.document.body.append(s) }) }
  postMessage(data) { this.waiting ? this.waiting.push(data) : this.scope.dispatchEvent(new MessageEvent("message", {data})) }
};

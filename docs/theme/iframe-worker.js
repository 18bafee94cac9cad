// A page that is read from a folder (file://) may not start a worker, and the search is one. There, and only there, a
// hidden frame of the same page runs the worker's script instead.
(function () {
  if (location.protocol !== "file:") return;

  window.Worker = class FrameWorker {
    constructor(url) {
      this.onmessage = this.onerror = this.onmessageerror = null;
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      // The script posts its answers by self.postMessage, which is the frame's.
      inner.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
      const script = inner.document.createElement("script");
      script.src = new URL(url, document.baseURI);
      script.onload = () => {
        const questions = this.waiting;
        this.waiting = null;
        questions.forEach((data) => this.postMessage(data));
      };
      script.onerror = (event) => this.onerror?.(event);
      inner.document.head.append(script);
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else setTimeout(() => this.frame.contentWindow?.onmessage?.({ data }));
    }

    terminate() {
      this.frame.remove();
    }
  };
})();

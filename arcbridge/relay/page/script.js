// Keeps the page as it is now, while it is looked at: takes the parts that the relay sends and puts each in the place of
// its former self where it differs. Without this script the page is the same one, and is reloaded by hand.
"use strict";
(() => {
  const live = document.getElementById("live");
  const patience = 45000; // milliseconds without any event after which the page says that it is old
  let source = null, heard = "", timer = 0;

  const say = (words) => { live.textContent = words; };
  const old = () => say(`not live since ${heard || "it was opened"}: the relay does not answer; reload to try again`);
  const wait = () => { clearTimeout(timer); timer = setTimeout(old, patience); };

  const take = (text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    for (const part of fresh.querySelectorAll("[data-live]")) {
      const former = document.getElementById(part.id);
      if (!former || former.innerHTML === part.innerHTML) continue;
      const focused = former.contains(document.activeElement) ? document.activeElement.id : "";
      former.replaceChildren(...part.childNodes);
      if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    }
    title();
  };
  const title = () => {
    const words = document.getElementById("summary");
    if (words) document.title = `${words.textContent} arcbridge`;
  };

  const stop = () => { clearTimeout(timer); if (source) source.close(); source = null; };
  const start = () => {
    stop();
    const asked = new URLSearchParams(location.search).get("q") || "";
    source = new EventSource(`/page/events?q=${encodeURIComponent(asked)}`);
    wait();
    source.addEventListener("facts", (event) => take(event.data));
    source.addEventListener("now", (event) => { heard = event.data; say(`live, as of ${heard}`); wait(); });
    source.addEventListener("over", (event) => { stop(); say(event.data); });
    source.onerror = () => {
      // The browser tries again by itself unless the relay has refused.
      if (source && source.readyState === EventSource.CLOSED) { stop(); say("your login is over, or the relay has too many pages open: reload"); }
    };
  };

  title();
  document.addEventListener("visibilitychange", () => (document.hidden ? stop() : start()));
  addEventListener("pagehide", stop);
  if (!document.hidden) start();
})();

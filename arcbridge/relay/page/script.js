// Keeps the page as it is now, while it is looked at: takes the parts that the relay sends and puts each in the place of
// its former self where it differs. Without this script the page is the same one, and is reloaded by hand.
"use strict";
(() => {
  const live = document.getElementById("live");
  const patience = 45000; // milliseconds without any event after which the page says that it is old
  const again = 30000; // milliseconds after which a stream that was refused is asked for once more
  const others = new BroadcastChannel("arcbridge-page"); // this browser's other windows at this relay
  let source = null, heard = "", timer = 0, ended = false;

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
  // A person without the right sees nothing of it any more.
  const end = (words) => {
    ended = true;
    stop();
    say(words);
    const way = Object.assign(document.createElement("a"), { href: "/page", className: "go", textContent: "Open the page again" });
    document.querySelector("main").replaceChildren(way);
    document.title = "arcbridge";
  };
  // An EventSource does not say why it was refused. Too many requests, or a balancer that has no relay, is no end.
  const refused = async (url) => {
    stop();
    say(`not live since ${heard || "it was opened"}: the relay refuses now; it is asked again`);
    timer = setTimeout(start, again);
    const aborted = new AbortController();
    try {
      const answer = await fetch(url, { signal: aborted.signal });
      if (answer.status !== 401 && answer.status !== 403) return;
      const notice = new DOMParser().parseFromString(await answer.text(), "text/html");
      end(notice.querySelector(".notice p")?.textContent || "your login is over");
    } catch {
      // The relay cannot be reached.
    } finally {
      aborted.abort();
    }
  };
  const start = () => {
    stop();
    if (ended) return;
    const asked = new URLSearchParams(location.search).get("q") || "";
    const url = `/page/events?q=${encodeURIComponent(asked)}`;
    source = new EventSource(url);
    wait();
    source.addEventListener("facts", (event) => take(event.data));
    source.addEventListener("now", (event) => { heard = event.data; say(`live, as of ${heard}`); wait(); });
    source.addEventListener("over", (event) => end(event.data));
    // The browser tries again by itself unless the relay has refused.
    source.onerror = () => { if (source?.readyState === EventSource.CLOSED) refused(url); };
  };

  document.querySelector("header form").addEventListener("submit", () => others.postMessage("over"));
  others.onmessage = () => end("you have logged out in another window");
  title();
  document.addEventListener("visibilitychange", () => (document.hidden ? stop() : start()));
  addEventListener("pagehide", stop);
  if (!document.hidden) start();
})();

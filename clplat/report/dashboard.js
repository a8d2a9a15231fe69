(() => {
  "use strict";
  // In a file the page filters itself: means stay those of all their runs, so a group is shown if all of them match.
  const form = document.querySelector(".filters");
  if (!form || "served" in form.dataset) return;
  const { runs, groups } = JSON.parse(document.getElementById("facts").textContent);
  const said = form.querySelector("[role=status]");
  const show = (selector, shown) => document.querySelectorAll(selector).forEach((e) => e.classList.toggle("gone", !shown));
  const apply = () => {
    const wanted = [...new FormData(form)].filter(([, value]) => value);
    const matches = runs.map((run) => wanted.every(([facet, value]) => run[facet].includes(value)));
    const streams = new Map();
    let shown = 0, parted = 0;
    for (const [at, members] of Object.entries(groups)) {
      const own = members.filter((i) => matches[i]).length, all = own === members.length;
      const [stream, group] = at.split("-");
      shown += all; parted += own > 0 && !all;
      streams.set(stream, streams.get(stream) || all);
      document.querySelector(`[data-at="${at}"]`).classList.toggle("other", !all);
      show(`#stream-${stream} [data-g="${group}"]`, all);
    }
    for (const [stream, any] of streams) show(`#stream-${stream}, [data-col="${stream}"]`, any);
    for (const row of document.querySelectorAll(".board tbody tr"))
      row.classList.toggle("gone", !row.querySelector("[data-at]:not(.other)"));
    matches.forEach((match, i) => show(`[data-run="${i}"]`, match));
    const more = parted ? ` ${parted} more have some: a file can't split their means; clplat dashboard with --commit or --tag does.` : "";
    said.textContent = wanted.length ? `${shown} of ${Object.keys(groups).length} entries have only matching runs.${more}` : "";
  };
  form.addEventListener("submit", (event) => { event.preventDefault(); apply(); });
  form.addEventListener("change", apply);
})();

(() => {
  "use strict";
  // Native tooltips come late and not at all on touch: take their text and show it at once.
  const tip = document.createElement("div");
  tip.className = "tip off";
  document.body.append(tip);
  for (const title of document.querySelectorAll(".panel svg title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }
  const place = (event) => {
    const target = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    if (!target) { tip.classList.add("off"); return; }
    tip.textContent = target.dataset.tip;
    tip.classList.remove("off");
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const below = event.clientY + 16 + box.height < innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below ? event.clientY + 16 : Math.max(8, event.clientY - box.height - 12)}px`;
  };
  document.addEventListener("pointermove", place);
  document.addEventListener("pointerdown", place);
  document.addEventListener("scroll", () => tip.classList.add("off"), { passive: true });

  // The legend hides a strategy on click and brings it out on hover, in all figures of its stream.
  for (const legend of document.querySelectorAll(".legend")) {
    const drawn = [...legend.closest(".stream").querySelectorAll(".panel[data-g], .panel .s[data-g]")];
    const dim = (group) => drawn.forEach((e) => e.classList.toggle("dim", group !== null && e.dataset.g !== group));
    for (const button of legend.querySelectorAll("button")) {
      const group = button.dataset.g;
      button.addEventListener("click", () => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(shown));
        drawn.filter((e) => e.dataset.g === group).forEach((e) => e.classList.toggle("off", !shown));
        dim(null);
      });
      button.addEventListener("pointerenter", () => dim(button.getAttribute("aria-pressed") === "true" ? group : null));
      button.addEventListener("pointerleave", () => dim(null));
    }
  }
})();

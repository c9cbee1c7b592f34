// Shows the figures under the pointer. Without it the charts are complete, only still.
for (const area of document.querySelectorAll(".area")) {
  const points = JSON.parse(area.dataset.points);
  const rule = area.appendChild(document.createElement("i"));
  const hint = area.appendChild(document.createElement("output"));
  rule.className = "rule";
  hint.className = "hint";
  const show = (event) => {
    const box = area.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    const [x, text] = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    rule.style.left = hint.style.left = `${100 * x}%`;
    hint.style.transform = `translateX(${-100 * x}%)`;
    hint.textContent = text;
    area.classList.add("touched");
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => area.classList.remove("touched"));
}

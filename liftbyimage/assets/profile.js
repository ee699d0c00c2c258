// What is pointed at in a drawing is told in a line and marked wherever it stands.
(() => {
  const tip = document.getElementById("tip");
  const number = (value, digits = 2) => Number(value).toLocaleString("en", { maximumFractionDigits: digits });

  const partOf = (mark) => {
    const [run, part] = mark.split(":").map(Number);
    return DATA.runs[run].parts[part];
  };

  const tell = (mark) => {
    const part = partOf(mark);
    const plain = part.reference_milliseconds === null ? "" : ` (plain ${number(part.reference_milliseconds, 3)} ms)`;
    tip.textContent =
      `${part.name}: ${number(part.milliseconds, 3)} ms${plain}, ${number(part.flops / 1e6)} MFLOP, ` +
      `${number(part.bytes / 1e6)} MB, ${number(part.gflops)} GFLOP/s: ${number(100 * part.of_matmul)} % of the ` +
      `matrix product's rate, ${number(100 * part.of_copy)} % of the copy's`;
  };

  const choose = (mark) => {
    for (const element of document.querySelectorAll("[data-part]")) {
      element.classList.toggle("chosen", element.dataset.part === mark);
    }
    tip.hidden = mark === null;
    if (mark !== null) tell(mark);
  };

  for (const kind of ["pointerover", "focusin"]) {
    document.addEventListener(kind, (event) => choose(event.target.closest("[data-part]")?.dataset.part ?? null));
  }
})();

"use strict";
(() => {
  const form = document.querySelector(".filter");
  const table = document.querySelector(".matrix");
  if (!form || !table) return;
  const text = form.querySelector("input");
  const verdict = form.querySelector("select");
  const shown = form.querySelector("output");
  const rows = [...table.querySelectorAll("tbody tr[data-text]")];
  function apply() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = verdict.value.split("|").filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const has = row.dataset.verdicts.split("|");
      const fits = words.every((word) => row.dataset.text.includes(word));
      row.hidden = !(fits && (wanted.length === 0 || wanted.some((one) => has.includes(one))));
      count += row.hidden ? 0 : 1;
    }
    for (const body of table.tBodies) body.hidden = !body.querySelector("tr[data-text]:not([hidden])");
    shown.value = `${count} of ${rows.length} laws`;
  }
  function reveal() {
    const target = location.hash ? document.getElementById(location.hash.slice(1)) : null;
    if (target instanceof HTMLDetailsElement) target.open = true;
  }
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", reveal);
  form.hidden = false;
  apply();
  reveal();
})();

// The filters of the failures; without this script they are absent, and every failure is shown.
const filters = document.getElementById("filters");
if (filters) {
  const items = [...document.querySelectorAll("#gallery > details")];
  const texts = items.map((item) => item.textContent.toLowerCase());
  const chosen = (name) => filters.elements[name].value;
  const apply = () => {
    let shown = 0;
    items.forEach((item, i) => {
      const fits = (name) => !chosen(name) || item.dataset[name].split(" ").includes(chosen(name));
      item.hidden = !(["kind", "field", "slice"].every(fits) && texts[i].includes(chosen("text").toLowerCase()));
      shown += !item.hidden;
    });
    filters.querySelector("output").textContent = `${shown} of ${items.length} shown`;
  };
  filters.hidden = false;
  filters.addEventListener("input", apply);
  filters.addEventListener("reset", () => setTimeout(apply));
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.elements.all.addEventListener("click", () => items.forEach((item) => { item.open = true; }));
  apply();
}

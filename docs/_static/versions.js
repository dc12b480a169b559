// The choice of another version of the site. A site of several versions has a folder for each, and versions.json beside
// the folders, which `.ci/release.py versions` writes. A site alone, or one opened from disk, has its own version only.
(() => {
  const select = document.getElementById("versions");
  const root = new URL(document.documentElement.dataset.content_root, location.href);
  const page = location.pathname.slice(root.pathname.length);
  const alone = !root.pathname.endsWith(`/${select.dataset.version}/`) || location.protocol === "file:";
  if (alone) return;
  const show = (versions) => {
    select.replaceChildren(
      ...versions.map((version) => new Option(version, version, false, version === select.dataset.version)),
    );
  };
  fetch(new URL("../versions.json", root)).then((answer) => (answer.ok ? answer.json().then(show) : undefined));
  select.addEventListener("change", async () => {
    const other = new URL(`../${select.value}/`, root);
    const same = new URL(page, other);
    location.href = (await fetch(same, { method: "HEAD" })).ok ? same : other;
  });
})();

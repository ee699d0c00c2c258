// Shared by every page: DATA, and the button between light and dark.
const DATA = JSON.parse(document.getElementById("data").textContent);

(() => {
  const root = document.documentElement;
  const button = document.createElement("button");
  const isDark = () =>
    root.style.colorScheme ? root.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => { button.textContent = isDark() ? "light" : "dark"; };
  button.id = "theme";
  button.title = "Switch between light and dark";
  button.addEventListener("click", () => {
    root.style.colorScheme = isDark() ? "light" : "dark";
    label();
    root.dispatchEvent(new Event("themechange")); // for what is drawn on a canvas
  });
  label();
  document.body.prepend(button);
})();

// what the theme leaves out for keyboards and screen readers: a name of the search, and a way to scroll wide code and tables
addEventListener("load", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const wide of document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap")) wide.tabIndex = 0;
});

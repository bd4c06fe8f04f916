(function () {
  "use strict";
  var features = JSON.parse(document.getElementById("feature-data").textContent);
  var field = document.getElementById("feature-search"), list = document.getElementById("feature-list");
  var found = document.getElementById("feature-count"), detail = document.getElementById("feature-detail");
  var more = document.getElementById("feature-more");
  var PAGE = 40, shown = PAGE, current = null, byNumber = new Map();

  features.forEach(function (one) { byNumber.set(one.feature, one); });
  var strength = function (one) { return one.attributes.length ? Math.abs(one.attributes[0].correlation || 0) : 0; };
  var ordered = features.slice().sort(function (a, b) { return strength(b) - strength(a) || a.feature - b.feature; });
  var texts = ordered.map(function (one) {
    var names = one.attributes.map(function (attribute) { return attribute.name; });
    var titles = one.top.concat(one.up, one.down).map(function (item) { return item.title; });
    return ["feature " + one.feature, "#" + one.feature].concat(names, titles).join("\n").toLowerCase();
  });

  function element(tag, text, className) {
    var made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function titles(heading, items, key) {
    var part = element("div"), rows = element("ol");
    part.append(element("h4", heading));
    items.forEach(function (item) {
      var row = element("li", item.title + " ");
      row.append(element("span", item[key].toFixed(3).replace("-", "−"), "value"));
      rows.append(row);
    });
    part.append(items.length ? rows : element("p", "none", "soft"));
    return part;
  }

  function histogram(one) {
    var space = "http://www.w3.org/2000/svg", drawing = document.createElementNS(space, "svg");
    var counts = one.histogram.counts, most = Math.max.apply(null, counts.concat(1));
    drawing.setAttribute("viewBox", "0 0 100 40");
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-label", "Histogram of activations, counts " + counts.join(", "));
    counts.forEach(function (count, place) {
      var bar = document.createElementNS(space, "rect"), height = 38 * Math.sqrt(count / most);
      bar.setAttribute("x", 100 * place / counts.length + 0.3);
      bar.setAttribute("y", 40 - height);
      bar.setAttribute("width", 100 / counts.length - 0.6);
      bar.setAttribute("height", height);
      bar.setAttribute("fill", "currentColor");
      drawing.append(bar);
    });
    return drawing;
  }

  function show(number, focus) {
    var one = byNumber.get(number);
    if (!one) return;
    current = number;
    var heading = element("h3", "Feature " + number), pair = element("div", undefined, "pair");
    heading.tabIndex = -1;
    var chips = element("div");
    one.attributes.forEach(function (attribute) {
      chips.append(element("span", attribute.name + " " + attribute.correlation.toFixed(2).replace("-", "−"), "chip"));
    });
    var edges = one.histogram.edges, near = element("div");
    pair.append(titles("Pushed up", one.up, "push"), titles("Pushed down", one.down, "push"));
    one.nearest.forEach(function (other) {
      var button = element("button", "Feature " + other.feature + " (cosine " + other.cosine.toFixed(2).replace("-", "−") + ")");
      button.type = "button";
      button.addEventListener("click", function () { show(other.feature, true); });
      near.append(button, " ");
    });
    detail.replaceChildren(heading, chips,
      element("p", "Fires on " + (100 * one.firing_rate).toFixed(2) + " % of rows.", "numbers"),
      titles("Strongest on", one.top, "value"), element("h4", "Activations when it fires (heights: square root of the count)"),
      histogram(one), element("p", edges.length ? edges[0].toFixed(2) + " to " + edges[edges.length - 1].toFixed(2) : "", "numbers"),
      pair, element("h4", "Nearest features"), near);
    list.querySelectorAll("button").forEach(function (button) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.feature) === number));
    });
    if (focus) heading.focus();
  }

  function search() {
    var words = field.value.toLowerCase().split(/\s+/).filter(Boolean), hits = ordered;
    if (words.length) {
      hits = ordered.filter(function (one, place) {
        return words.every(function (word) { return texts[place].includes(word); });
      });
    }
    list.replaceChildren();
    hits.slice(0, shown).forEach(function (one) {
      var row = element("li"), button = element("button", "Feature " + one.feature);
      var text = one.attributes.length ? one.attributes[0].name : one.top.length ? one.top[0].title : "";
      button.type = "button";
      button.dataset.feature = one.feature;
      button.setAttribute("aria-pressed", String(one.feature === current));
      button.append(element("span", text ? " · " + text : "", "value"));
      button.addEventListener("click", function () { show(one.feature, false); });
      row.append(button);
      list.append(row);
    });
    found.textContent = hits.length.toLocaleString("en") + " of " + features.length.toLocaleString("en") + " features";
    more.hidden = hits.length <= shown;
    return hits;
  }

  function follow(focus) {
    var match = /^#feature-(\d+)$/.exec(location.hash);
    if (!match) return false;
    show(Number(match[1]), focus);
    if (focus) detail.scrollIntoView();
    return true;
  }

  field.addEventListener("input", function () { shown = PAGE; search(); });
  more.addEventListener("click", function () { shown += PAGE; search(); });
  window.addEventListener("hashchange", function () { follow(true); });
  var first = search()[0];
  if (!follow(true) && first) show(first.feature, false);
})();

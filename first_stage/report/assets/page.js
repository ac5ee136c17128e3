"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // -- originals over reconstructions -----------------------------------------------------------
  const grid = document.querySelector(".pairs");
  const state = grid ? { ...grid.dataset } : {};

  function setCut(figure, percent) {
    const cut = Math.min(Math.max(percent, 0), 100);
    figure.style.setProperty("--cut", cut + "%");
    const input = figure.querySelector("input.wipe");
    if (input) input.value = cut;
  }

  function dress(figure) {
    figure.classList.toggle("overlay", state.mode !== "side");
    figure.classList.toggle("wipeable", state.mode === "wipe");
    figure.classList.toggle("subtracted", state.mode === "difference");
    figure.classList.toggle("side", state.mode === "side");
    for (const part of all("[data-stage]", figure)) {
      part.classList.toggle("chosen", part.dataset.stage === state.stage);
    }
  }

  function wire(figure) {
    const views = figure.querySelector(".views");
    const input = figure.querySelector("input.wipe");
    input.addEventListener("input", () => setCut(figure, Number(input.value)));
    const follow = (event) => {
      if (state.mode !== "wipe") return;
      const box = views.getBoundingClientRect();
      setCut(figure, (100 * (event.clientX - box.left)) / box.width);
    };
    views.addEventListener("pointerdown", (event) => {
      if (state.mode !== "wipe" || event.button !== 0) return;
      event.preventDefault();
      views.setPointerCapture(event.pointerId);
      follow(event);
      views.addEventListener("pointermove", follow);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      views.addEventListener(end, () => views.removeEventListener("pointermove", follow));
    }
  }

  function sortPairs() {
    const error = (figure) => Number(figure.dataset.psnr.split(" ")[Number(state.stage)]);
    const keys = {
      data: (figure) => Number(figure.dataset.order),
      worst: error,
      best: (figure) => -error(figure),
      gain: (figure) => Number(figure.dataset.gain),
    };
    const key = keys[state.sort];
    grid.append(...all(".pair", grid).sort((a, b) => key(a) - key(b)));
  }

  function update() {
    all(".pair", grid).forEach(dress);
    grid.classList.toggle("side", state.mode === "side");
    sortPairs();
    for (const button of all(".toolbar button")) {
      const [name, value] = Object.entries(button.dataset)[0];
      button.setAttribute("aria-pressed", String(state[name] === value));
    }
  }

  // -- zoom ---------------------------------------------------------------------------------------
  function zoomInto(figure) {
    const dialog = document.createElement("dialog");
    dialog.classList.toggle("change", grid.classList.contains("change"));
    const name = figure.querySelector("figcaption b").textContent;
    const natural = figure.querySelector("img").width || figure.querySelector("img").naturalWidth;
    dialog.innerHTML =
      '<div class="dialog"><div class="bar"><b></b></div><div class="stage"></div>' +
      '<div class="foot"><input type="range" min="0" max="100" step="0.25" aria-label="Wipe"></div></div>';
    const copy = figure.cloneNode(true);
    const frame = dialog.firstChild;
    const stage = dialog.querySelector(".stage");
    const slider = dialog.querySelector(".foot input");
    dialog.querySelector("b").textContent = name;
    stage.append(copy);
    wire(copy);
    const size = Number(figure.querySelector("img").getAttribute("width")) || natural;
    const columns = grid.classList.contains("change") ? all(".view", copy).length : 2;
    copy.style.setProperty("--natural", size * (state.mode === "side" ? columns : 1));
    const buttons = [1, 2, 4, 8, 16].map((factor) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = factor + "×";
      button.addEventListener("click", () => show(factor));
      dialog.querySelector(".bar").append(button);
      return [factor, button];
    });
    function show(factor) {
      const x = (stage.scrollLeft + stage.clientWidth / 2) / stage.scrollWidth;
      const y = (stage.scrollTop + stage.clientHeight / 2) / stage.scrollHeight;
      copy.style.setProperty("--zoom", factor);
      frame.classList.toggle("big", factor > 1);
      for (const [f, button] of buttons) button.setAttribute("aria-pressed", String(f === factor));
      stage.scrollLeft = x * stage.scrollWidth - stage.clientWidth / 2;
      stage.scrollTop = y * stage.scrollHeight - stage.clientHeight / 2;
    }
    const close = document.createElement("button");
    close.type = "button";
    close.textContent = "Close";
    close.addEventListener("click", () => dialog.close());
    dialog.querySelector(".bar").append(close);
    slider.hidden = state.mode !== "wipe";
    slider.autofocus = true;
    slider.value = parseFloat(copy.style.getPropertyValue("--cut")) || 50;
    slider.addEventListener("input", () => setCut(copy, Number(slider.value)));
    copy.querySelector(".views").addEventListener("pointermove", () => {
      slider.value = parseFloat(copy.style.getPropertyValue("--cut")) || 50;
    });
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
    const room = Math.min(stage.clientWidth - 24, 900) / size;
    show([16, 8, 4, 2, 1].find((factor) => factor <= room) || 1);
  }

  if (grid) {
    all(".pair", grid).forEach((figure) => {
      wire(figure);
      figure.querySelector(".zoom").addEventListener("click", () => zoomInto(figure));
    });
    for (const button of all(".toolbar button")) {
      button.addEventListener("click", () => {
        Object.assign(state, button.dataset);
        update();
      });
    }
    update();
  }

  // -- values under the pointer -------------------------------------------------------------------
  const short = (value) =>
    value === null ? "–" : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
      ? value.toExponential(2) : String(Number(value.toPrecision(4)));

  for (const figure of all("figure.chart")) {
    const chart = JSON.parse(figure.dataset.chart);
    const svg = figure.querySelector("svg");
    const cursor = figure.querySelector(".cursor");
    const output = figure.querySelector("output");
    const leave = () => {
      cursor.style.visibility = "hidden";
      output.textContent = "";
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * chart.width;
      const share = (at - chart.left) / (chart.right - chart.left);
      const x = chart.low + share * (chart.high - chart.low);
      const nearest = (points) =>
        points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const found = chart.series.filter((s) => s.points.length).map((s) => [s.name, nearest(s.points)]);
      if (!found.length || share < -0.03 || share > 1.03) return leave();
      const place = found[0][1][0];
      const pixel = chart.left + ((place - chart.low) / (chart.high - chart.low)) * (chart.right - chart.left);
      cursor.setAttribute("x1", pixel);
      cursor.setAttribute("x2", pixel);
      cursor.style.visibility = "visible";
      const values = found.map(([name, p]) => (found.length > 1 ? name + " " : "") + short(p[1]));
      output.textContent = short(place) + ": " + values.join(", ");
    });
    svg.addEventListener("pointerleave", leave);
  }
})();

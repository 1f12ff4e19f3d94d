(() => {
  // Colours that stay apart for all common kinds of colour vision, darker on white than on black
  // (after the set of Okabe and Ito).
  const series = {
    light: ["#0072b2", "#c44e00", "#00795a", "#a8327a", "#8a6d00", "#555555"],
    dark: ["#56b4e9", "#ff9350", "#3ccf9f", "#f092c8", "#e9c83a", "#c0c0c0"],
  };
  const theme = {
    light: { text: "#1b1f24", grid: "#e3e7ec", line: "#8a939e", card: "#ffffff" },
    dark: { text: "#e6e8eb", grid: "#2b313a", line: "#7d8794", card: "#1c2027" },
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function coloured(trace, colour) {
    trace.marker = { ...trace.marker, color: colour };
    if (trace.marker.line) trace.marker.line = { ...trace.marker.line, color: colour };
    if (trace.type === "scatter") trace.line = { ...trace.line, color: colour };
  }

  function draw(at) {
    const { data, layout } = JSON.parse(at.figure);
    const mode = dark.matches ? "dark" : "light";
    const colours = theme[mode];
    const width = at.clientWidth;
    const narrow = width < 480;
    for (const trace of data) {
      if (trace.type === "heatmap") {
        trace.colorbar = { ...trace.colorbar, tickfont: { color: colours.text }, outlinewidth: 0 };
        // Numbers in cells that are too small for them give way to a scale.
        const digits = Math.max(0, ...(layout.annotations || []).map(({ text }) => text.length));
        if (digits && trace.z[0].length * (7 * digits + 6) > width - 150) {
          delete layout.annotations;
          trace.showscale = true;
        }
      } else if (trace.meta !== undefined) {
        coloured(trace, series[mode][trace.meta % series[mode].length]);
      }
    }
    layout.width = width;
    // A map of tokens is about as high as it is wide.
    const map = data[0].type === "heatmap" && data[0].z.length > 16;
    if (narrow && map) layout.height = Math.min(layout.height, width + 60);
    if (narrow && layout.showlegend) layout.height += 60; // its lines stand below each other
    at.style.height = `${layout.height}px`;
    layout.font = { color: colours.text, size: narrow ? 11 : 12, family: "system-ui, sans-serif" };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.hoverlabel = { bgcolor: colours.card, font: { color: colours.text } };
    for (const axis of [layout.xaxis, layout.yaxis]) {
      axis.gridcolor = colours.grid;
      axis.linecolor = axis.tickcolor = colours.line;
      if (axis.tickvals && axis.tickvals.length > 16) axis.tickfont = { size: narrow ? 7 : 9 };
    }
    Plotly.react(at, data, layout, { displayModeBar: false });
  }

  // Each is drawn when its width is known, and again when that changes.
  const widths = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.clientWidth && target.drawn !== target.clientWidth) {
        target.drawn = target.clientWidth;
        draw(target);
      }
    }
  });
  const plots = [...document.querySelectorAll(".plot")];
  for (const at of plots) {
    at.figure = document.querySelector(`script[data-for="${at.id}"]`).textContent;
    widths.observe(at);
  }
  dark.addEventListener("change", () => plots.forEach(draw));
})();

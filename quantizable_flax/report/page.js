(() => {
  // Colours that remain apart in all common kinds of colour vision, as dark or light as the ground
  // needs (Okabe and Ito's set, darker where it is to be seen on white).
  const series = {
    light: ["#0072b2", "#c44e00", "#00795a", "#a8327a", "#8a6d00", "#555555"],
    dark: ["#56b4e9", "#ff9350", "#3ccf9f", "#f092c8", "#e9c83a", "#c0c0c0"],
  };
  const theme = {
    light: { text: "#1b1f24", grid: "#e3e7ec", line: "#8a939e", card: "#ffffff" },
    dark: { text: "#e6e8eb", grid: "#2b313a", line: "#7d8794", card: "#1c2027" },
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")].map((at) => ({
    at,
    text: document.querySelector(`script[data-for="${at.id}"]`).textContent,
  }));

  function draw({ at, text }) {
    const { data, layout } = JSON.parse(text);
    const mode = dark.matches ? "dark" : "light";
    const colours = theme[mode];
    const narrow = at.clientWidth < 480;
    for (const trace of data) {
      const colour = series[mode][(trace.meta || 0) % series[mode].length];
      if (trace.type === "heatmap") {
        trace.colorbar = { ...trace.colorbar, tickfont: { color: colours.text }, outlinewidth: 0 };
        const columns = trace.z[0].length;
        if (trace.texttemplate && columns * (narrow ? 46 : 30) > at.clientWidth) {
          delete trace.texttemplate;
          trace.showscale = true;
        }
      } else if (trace.meta !== undefined) {
        const line = { ...(trace.marker || {}).line, color: colour };
        trace.marker = { ...trace.marker, color: colour };
        if (trace.marker.line) trace.marker.line = line;
        if (trace.type === "scatter") trace.line = { ...trace.line, color: colour };
      }
    }
    layout.font = { color: colours.text, size: 12, family: "system-ui, sans-serif" };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.hoverlabel = { bgcolor: colours.card, font: { color: colours.text } };
    for (const name of ["xaxis", "yaxis"]) {
      const axis = layout[name];
      Object.assign(axis, { gridcolor: colours.grid, linecolor: colours.line, tickcolor: colours.line });
      const many = axis.tickvals ? axis.tickvals.length : 0;
      if (many > 16) axis.tickfont = { size: narrow ? 7 : 9 };
    }
    Plotly.react(at, data, layout, { responsive: true, displayModeBar: false });
  }

  const all = () => plots.forEach(draw);
  all();
  dark.addEventListener("change", all);
  let width = innerWidth;
  addEventListener("resize", () => {
    if ((width < 640) !== (innerWidth < 640)) all();
    width = innerWidth;
  });
})();

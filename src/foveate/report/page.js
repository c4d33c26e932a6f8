"use strict";
(() => {
  document.body.classList.add("js");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Tabs: one use at a time, and in it one length at a time.
  const show = (group, id) => {
    all(`.tabs[data-group="${group}"] button`).forEach((b) => b.setAttribute("aria-selected", b.dataset.show === id));
    all(`[data-in="${group}"]`).forEach((part) => part.classList.toggle("shown", part.id === id));
  };
  all(".tabs").forEach((tabs) => {
    const buttons = all("button", tabs);
    buttons.forEach((button, i) => {
      button.addEventListener("click", () => show(tabs.dataset.group, button.dataset.show));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = buttons[(i + step + buttons.length) % buttons.length];
        next.focus();
        next.click();
      });
    });
  });
  new Set(all("[data-in]").map((part) => part.dataset.in)).forEach((group) => {
    show(group, document.querySelector(`[data-in="${group}"]`).id);
  });

  // Tooltips, by pointer and by keyboard; a point lights up its whole method.
  const tip = document.getElementById("tip");
  const hide = () => {
    tip.hidden = true;
    all(".dimming").forEach((svg) => svg.classList.remove("dimming"));
    all(".lit").forEach((part) => part.classList.remove("lit"));
  };
  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
    const top = y + 14 + box.height > innerHeight ? y - 14 - box.height : y + 14;
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${Math.max(6, top)}px`;
  };
  const open = (part, x, y) => {
    hide();
    tip.textContent = part.dataset.tip;
    tip.hidden = false;
    place(x, y);
    const svg = part.closest("svg.scatter");
    if (!svg) return;
    svg.classList.add("dimming");
    all("[data-series]", svg).forEach((other) => {
      other.classList.toggle("lit", other.dataset.series === part.dataset.series);
    });
  };
  all("[data-tip]").forEach((part) => {
    part.addEventListener("pointerenter", (event) => open(part, event.clientX, event.clientY));
    part.addEventListener("pointermove", (event) => place(event.clientX, event.clientY));
    part.addEventListener("pointerleave", hide);
    part.addEventListener("focus", () => {
      const box = part.getBoundingClientRect();
      open(part, box.right, box.bottom);
    });
    part.addEventListener("blur", hide);
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());

  // Tables: sort by a column, filter by text and by verdict.
  all(".table").forEach((box) => {
    const body = box.querySelector("tbody");
    const heads = all("thead th", box);
    const value = (row, i) => row.cells[i]?.dataset.sort ?? "";
    const sort = (i) => {
      const up = heads[i].getAttribute("aria-sort") !== "ascending";
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      heads[i].setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = all("tr", body);
      rows.sort((a, b) => {
        const [x, y] = [value(a, i), value(b, i)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const [m, n] = [Number(x), Number(y)];
        const order = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
        return up ? order : -order;
      });
      body.append(...rows);
    };
    heads.forEach((head, i) => {
      head.tabIndex = 0;
      head.addEventListener("click", () => sort(i));
      head.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        sort(i);
      });
    });
    const inputs = all("[data-filter], [data-pick]", box);
    const rows = all("tr", body).map((row) => [row, row.dataset.text.toLowerCase()]);
    const tests = {
      search: (row, text, input) => input.value.toLowerCase().split(/\s+/).every((word) => text.includes(word)),
      front: (row, text, input) => !input.checked || row.dataset.front === "1",
      clean: (row, text, input) => !input.checked || row.dataset.loss !== "1",
    };
    const passes = (row, text, input) => {
      const { filter, pick } = input.dataset;
      if (filter) return tests[filter](row, text, input);
      return !input.value || row.dataset[pick].split("\n").includes(input.value);
    };
    const picked = box.querySelector(".picked");
    const filter = () => {
      let shown = 0;
      rows.forEach(([row, text]) => {
        row.hidden = !inputs.every((input) => passes(row, text, input));
        shown += !row.hidden;
      });
      const count = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
      box.querySelector(".count").textContent = count;
      if (!picked) return;
      const said = inputs.filter((input) => input.value).map((input) => {
        return input.dataset.pick ? `${input.dataset.pick} ${input.selectedOptions[0].textContent}` : `“${input.value}”`;
      });
      picked.textContent = said.length ? `${count}: ${said.join(", ")}` : "";
    };
    inputs.forEach((input) => input.addEventListener("input", filter));
    box.querySelector("[data-clear]")?.addEventListener("click", () => {
      inputs.forEach((input) => (input.value = ""));
      filter();
      inputs[0].focus();
    });
    filter();
  });

  all(".command button").forEach((button) => {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("pre").textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 1600);
    });
  });
})();

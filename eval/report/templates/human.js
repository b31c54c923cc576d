"use strict";
(function () {
  const pack = document.body.dataset.pack;
  const pairs = Array.from(document.querySelectorAll("[data-pair]"));
  const key = "carrara-votes-" + pack;
  let votes = {};
  let at = 0;
  try { votes = JSON.parse(localStorage.getItem(key) || "{}"); } catch (error) { votes = {}; }
  function store() { try { localStorage.setItem(key, JSON.stringify(votes)); } catch (error) { /* private window */ } }
  function show() {
    pairs.forEach(function (pair, i) { pair.hidden = i !== at; });
    document.getElementById("place").textContent = (at + 1) + " of " + pairs.length;
    document.getElementById("count").textContent = Object.keys(votes).length + " of them done";
    const mine = votes[pairs[at].dataset.pair];
    document.querySelectorAll("[data-choice]").forEach(function (b) { b.setAttribute("aria-pressed", String(b.dataset.choice === mine)); });
  }
  function move(by) { at = Math.min(pairs.length - 1, Math.max(0, at + by)); show(); }
  function vote(choice) { votes[pairs[at].dataset.pair] = choice; store(); if (at < pairs.length - 1) move(1); else show(); }
  function own() {
    const fresh = Array.from(crypto.getRandomValues(new Uint8Array(8)), function (b) { return b.toString(16).padStart(2, "0"); }).join("");
    try { const kept = localStorage.getItem(key + "-voter") || fresh; localStorage.setItem(key + "-voter", kept); return kept; } catch (error) { return fresh; }
  }
  function save() {
    const name = document.getElementById("voter").value.replace(/[^\p{L}\p{N} _.-]/gu, "").slice(0, 40) || "voter-" + own();
    const voter = /^[=+\-@]/.test(name) ? "_" + name : name;
    const lines = ["pack,voter,pair,choice"].concat(Object.keys(votes).map(function (pair) { return [pack, voter, pair, votes[pair]].join(","); }));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = "votes-" + pack + "-" + voter.replace(/ /g, "_") + ".csv";
    link.click();
  }
  document.addEventListener("click", function (event) {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.choice) vote(button.dataset.choice);
    else if (button.id === "back") move(-1);
    else if (button.id === "next") move(1);
    else if (button.id === "save") save();
  });
  document.addEventListener("keydown", function (event) {
    if (event.target.tagName === "INPUT") return;
    if (event.key === "1") vote("left");
    else if (event.key === "2") vote("right");
    else if (event.key === "0") vote("tie");
    else if (event.key === "ArrowLeft") move(-1);
    else if (event.key === "ArrowRight") move(1);
  });
  at = Math.max(0, pairs.findIndex(function (pair) { return !(pair.dataset.pair in votes); }));
  show();
})();

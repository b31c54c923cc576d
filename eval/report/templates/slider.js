"use strict";
document.addEventListener("input", function (event) {
  if (event.target.id === "cut") document.documentElement.style.setProperty("--cut", event.target.value + "%");
});

// A canvas whose picture is the component's value: a data: address, "" while it is empty. Nothing is uploaded as a file.
const canvas = element.querySelector("canvas");
const pen = canvas.getContext("2d");
const [file, colour, brush] = element.querySelectorAll("input");
let last = null, timer = null;

function send() {
  timer = null;
  props.value = canvas.toDataURL("image/jpeg", 0.92);
  trigger("input");
}

function changed() {  // at most every 80 ms while a line is drawn
  if (timer === null) timer = setTimeout(send, 80);
}

function fill() {
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}

canvas.addEventListener("pointerdown", event => {
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
});
canvas.addEventListener("pointermove", event => {
  if (last === null) return;
  const next = place(event);
  pen.strokeStyle = colour.value;
  pen.lineWidth = brush.value;
  pen.lineCap = "round";
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(...next);
  pen.stroke();
  last = next;
  changed();
});
canvas.addEventListener("pointerup", () => { last = null; });
canvas.addEventListener("pointercancel", () => { last = null; });

file.addEventListener("change", async () => {
  if (!file.files.length) return;
  let picture;
  try {
    picture = await createImageBitmap(file.files[0]);
  } catch {
    file.value = "";
    props.value = "not a picture";  // the server says so
    trigger("input");
    return;
  }
  const side = Math.min(picture.width, picture.height);
  fill();
  pen.drawImage(picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side,
                0, 0, canvas.width, canvas.height);
  send();
});

element.querySelector("button").addEventListener("click", () => {
  clearTimeout(timer);
  timer = null;
  fill();
  file.value = "";
  props.value = "";
  trigger("input");
});

fill();

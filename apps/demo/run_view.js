// The view of a run, for gr.HTML's js_on_load: `element` holds run_view's HTML, `watch` says when it has been replaced.
// Gradio updates the page in place instead of rebuilding it, so what a visitor chose is kept here and put on again.
const chosen = { run: null, place: null, path: null, table: false };

const one = (selector) => element.querySelector(selector);
const all = (selector) => [...element.querySelectorAll(selector)];
const closest = (event, selector) => (event.target instanceof Element ? event.target.closest(selector) : null);

// place: null follows the newest reading
function show() {
  const frames = all('.steer-frame');
  const scrubber = one('.steer-scrubber');
  if (!scrubber || !frames.length) return;
  const last = frames.length - 1;
  const place = Math.min(chosen.place ?? last, last);
  frames.forEach((frame, number) => { frame.hidden = number !== place; });
  scrubber.max = String(last);
  scrubber.value = String(place);
  const label = frames[place].dataset.label;
  scrubber.setAttribute('aria-valuetext', label);
  one('.steer-reading').textContent = label;
  for (const button of all('[data-move]')) {
    const to = place + Number(button.dataset.move);
    button.setAttribute('aria-disabled', String(to < 0 || to > last)); // still focusable, unlike `disabled`
  }
}

function scrub(place) {
  const last = all('.steer-frame').length - 1;
  const to = Math.max(0, Math.min(place, last));
  chosen.place = to === last ? null : to;
  show();
}

// Lights the lineage of the chosen particle, in the tree and among the images.
function light() {
  const dot = chosen.path === null ? null : all('.steer-dot').find((each) => each.dataset.key === chosen.path);
  const path = new Set(dot ? dot.dataset.path.split(' ') : []);
  one('.steer-run')?.classList.toggle('steer-lighting', path.size > 0);
  for (const each of all('[data-key]')) each.classList.toggle('steer-lit', path.has(each.dataset.key));
  for (const each of all('.steer-dot')) each.setAttribute('aria-pressed', String(each === dot));
}

function choose(key) {
  chosen.path = chosen.path === key ? null : key;
  light();
}

// One dot takes part in the order of Tab, arrows lead to the others: 32 particles would be hundreds of stops.
function rove(to) {
  const dots = all('.steer-dot');
  const here = dots.find((dot) => dot === document.activeElement);
  const stop = to ?? here ?? dots.find((dot) => dot.dataset.key === chosen.path) ?? dots.at(-1);
  for (const dot of dots) dot.setAttribute('tabindex', dot === stop ? '0' : '-1');
}

function arrow(dot, key) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  if (!step) return false;
  const [column, slot] = dot.dataset.key.split('-').map(Number);
  const next = all('.steer-dot').find((each) => each.dataset.key === `${column + step[0]}-${slot + step[1]}`);
  if (next) { rove(next); next.focus(); }
  return true;
}

function renew() {
  const run = one('.steer-run')?.dataset.run ?? null;
  if (run !== chosen.run) Object.assign(chosen, { run, place: null, path: null });
  const table = one('.steer-numbers');
  if (table) table.open = chosen.table;
  show();
  light();
  rove();
}

element.addEventListener('input', (event) => {
  const scrubber = closest(event, '.steer-scrubber');
  if (scrubber) scrub(Number(scrubber.value));
});

element.addEventListener('click', (event) => {
  const button = closest(event, '[data-move]');
  const dot = closest(event, '.steer-dot');
  if (button) scrub(Number(one('.steer-scrubber').value) + Number(button.dataset.move));
  if (dot) { rove(dot); choose(dot.dataset.key); }
  // its click comes before it opens or closes
  if (closest(event, '.steer-numbers > summary')) chosen.table = !one('.steer-numbers').open;
});

element.addEventListener('keydown', (event) => {
  const dot = closest(event, '.steer-dot');
  if (event.key === 'Escape' && chosen.path !== null) choose(chosen.path);
  if (!dot || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Enter' || event.key === ' ') choose(dot.dataset.key);
  else if (!arrow(dot, event.key)) return;
  event.preventDefault();
});

watch('value', renew);
renew();

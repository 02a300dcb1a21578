// For gr.HTML's js_on_load: `element` holds a view of label_tab.py, `watch` says when it has been replaced, `trigger`
// sends an answer with the group of images that was seen. A view takes one answer; keys count unless somebody is typing.
const KEYS = { 1: '0', 2: '1', 3: '2', 4: '3', t: 'tie', b: 'bad', s: 'skip', u: 'undo' };
const ARROWS = { ArrowLeft: '0', ArrowRight: '1' };
const TYPING = 'input, textarea, select, [contenteditable="true"], [role="tab"], [role="slider"], [role="listbox"]';
let answered = null;
let group = '';
let zoomed = false; // stays for the next images

const view = () => element.querySelector('.steer-label');
const buttonOf = (answer) => element.querySelector(`button[data-answer="${answer}"]`);

function answer(word) {
  const { turn, group: seen } = view().dataset;
  const button = buttonOf(word);
  if (!button || answered === turn) return false;
  answered = turn;
  view().classList.add('steer-sent');
  button.classList.add('steer-pressed');
  trigger('answer', { group: seen, answer: word });
  return true;
}

function zoom(to) {
  zoomed = to;
  const button = element.querySelector('[data-zoom]');
  view()?.classList.toggle('steer-zoomed', zoomed && button !== null);
  button?.setAttribute('aria-pressed', String(zoomed));
}

function onKey(event) {
  if (!element.isConnected) return document.removeEventListener('keydown', onKey);
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (!view() || !element.checkVisibility() || (event.target instanceof Element && event.target.closest(TYPING))) return;
  const key = event.key.toLowerCase();
  if (element.querySelector('[data-zoom]') && (key === 'z' || (key === 'escape' && zoomed))) {
    event.preventDefault();
    zoom(key === 'z' && !zoomed);
    return;
  }
  const arrows = element.querySelector('.steer-group-2') ? ARROWS : {};
  const word = arrows[event.key] ?? KEYS[key];
  if (word !== undefined && buttonOf(word)) {
    event.preventDefault(); // arrows would scroll
    answer(word);
  }
}

// What was in focus is gone when images come in place of a line: keys and screen readers start from the images.
function renew() {
  const seen = view()?.dataset.group ?? '';
  const lost = document.activeElement === null || document.activeElement === document.body;
  if (seen && !group && lost && element.checkVisibility()) {
    view().focus({ preventScroll: true });
    requestAnimationFrame(() => view()?.scrollIntoView({ block: 'nearest' }));
  }
  group = seen;
  zoom(zoomed);
}

element.addEventListener('click', (event) => {
  const target = event.target instanceof Element ? event.target.closest('[data-answer], [data-image]') : null;
  if (target) answer(target.dataset.answer ?? target.dataset.image);
  if (event.target instanceof Element && event.target.closest('[data-zoom]')) zoom(!zoomed);
});
document.addEventListener('keydown', onKey);
watch('value', renew);
renew();

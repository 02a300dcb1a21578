// Ctrl+Enter, or Cmd+Enter, in a field of the Steer tab starts a run. For gr.HTML's js_on_load.
document.addEventListener('keydown', (event) => {
  const start = document.querySelector('#steer-start');
  const here = start?.closest('[role="tabpanel"]')?.contains(event.target);
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey) || !here || start.disabled) return;
  event.preventDefault();
  event.target.dispatchEvent(new Event('change', { bubbles: true })); // the value of a field that waits for its end
  start.click();
});

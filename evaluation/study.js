const form = document.forms[0]
const buttons = [...form.querySelectorAll('button')], images = [...form.querySelectorAll('img')]
let ready = false
// Who has not seen both pictures cannot choose; nor does the second click of a double-click answer the next pair.
addEventListener('pageshow', () => {
  ready = false
  Promise.all(images.map(image => image.decode())).then(
    () => setTimeout(() => ready = true, 300),
    () => document.getElementById('lost').hidden = false)
  for (const image of images) if (image.dataset.next) new Image().src = image.dataset.next
})
form.onsubmit = event => { if (!ready) event.preventDefault(); ready = false }
addEventListener('keydown', event => {
  const target = event.key === 'Backspace' ? document.getElementById('back')
    : buttons.find(button => button.dataset.key === event.key)
  if (!target || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return
  event.preventDefault()
  target.click()
})

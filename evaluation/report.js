const differences = JSON.parse(document.getElementById('differences').textContent)
const list = document.getElementById('pairs'), cards = [...list.children]
const by = document.getElementById('by'), first = document.getElementById('first')
function sort() {
  const wanted = new URLSearchParams(location.hash.slice(1)), d = differences[wanted.get('sort')]
  const sign = wanted.get('first') === 'gains' ? -1 : 1
  by.value = d ? wanted.get('sort') : ''
  first.value = sign < 0 ? 'gains' : 'regressions'
  first.disabled = !d
  const order = cards.map((_, i) => i)
  if (d) order.sort((a, b) => sign * (d[a] - d[b]) || a - b)
  list.append(...order.map(i => cards[i]))
}
function choose() { location.hash = new URLSearchParams(by.value ? {sort: by.value, first: first.value} : {}) }
by.onchange = first.onchange = choose
window.onhashchange = sort
document.getElementById('controls').hidden = false
sort()

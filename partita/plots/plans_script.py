"""What the page of plans runs: it sorts the table, and draws what is chosen from the page's data."""

SHEET = """
#table th{cursor:pointer}
#table tbody tr{cursor:pointer}
#table tr.chosen td{background:#e7f0fb}
#table td:nth-child(n+3),#table th:nth-child(n+3){text-align:right;font-variant-numeric:tabular-nums}
.scroll td:nth-child(2){white-space:normal;overflow-wrap:anywhere;min-width:180px}
h1,h2,li,.note,.detail{overflow-wrap:anywhere}
svg text{font:12px system-ui,sans-serif;fill:#1c2430}
.wide{overflow-x:auto}
.span,.dot{cursor:pointer}
.dot.chosen{stroke:#b3261e;stroke-width:3}
#why{font-size:14px}
"""

SCRIPT = """
'use strict';
var data = JSON.parse(document.getElementById('data').textContent), plans = data.plans;
var SVG = 'http://www.w3.org/2000/svg';
function draw(parent, name, attributes, text) {
  var element = document.createElementNS(SVG, name);
  for (var key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}
function canvas(id, width, height) {
  var svg = document.getElementById(id);
  svg.textContent = '';
  svg.setAttribute('width', width);
  svg.setAttribute('height', height);
  return svg;
}
function size(bytes, digits) {
  digits = digits || 3;
  return bytes >= 1e9 ? (bytes / 1e9).toPrecision(digits) + ' GB' : (bytes / 1e6).toPrecision(digits) + ' MB';
}
function duration(seconds, digits) {
  digits = digits || 4;
  return seconds >= 1 ? seconds.toPrecision(digits) + ' s' : (seconds * 1e3).toPrecision(digits) + ' ms';
}
function digitsOf(low, high, least) {  // enough to tell four ticks between the two apart
  var step = (high - low) / 4, whole = Math.floor(Math.log10(high)) - Math.floor(Math.log10(step));
  return Math.max(least, Math.min(whole + 2, 12));
}
function range(values) {
  var low = Math.min.apply(null, values), high = Math.max.apply(null, values);
  var room = (high - low || high || 1) * 0.08;
  return [low - room, high + room];
}
function scatter() {
  var width = 1100, height = 340, left = 76, bottom = 44, svg = canvas('scatter', width, height);
  var x = range(plans.map(function (p) { return p.seconds; }));
  var y = range(plans.map(function (p) { return p.bytes; }));
  function px(v) { return left + (v - x[0]) / (x[1] - x[0]) * (width - left - 20); }
  function py(v) { return height - bottom - (v - y[0]) / (y[1] - y[0]) * (height - bottom - 16); }
  for (var i = 0; i <= 4; i++) {
    var tx = x[0] + (x[1] - x[0]) * i / 4, ty = y[0] + (y[1] - y[0]) * i / 4;
    draw(svg, 'line', {x1: left, x2: width - 20, y1: py(ty), y2: py(ty), stroke: '#e8ebef'});
    draw(svg, 'text', {x: left - 8, y: py(ty) + 4, 'text-anchor': 'end'},
      size(ty, digitsOf(y[0], y[1], 3)));
    draw(svg, 'text', {x: px(tx), y: height - 24, 'text-anchor': i < 4 ? 'middle' : 'end'},
      duration(tx, digitsOf(x[0], x[1], 4)));
  }
  draw(svg, 'text', {x: width / 2, y: height - 6, 'text-anchor': 'middle'},
       'seconds a step; memory of the fullest rank');
  plans.forEach(function (p, i) {
    var dot = draw(svg, 'circle', {cx: px(p.seconds), cy: py(p.bytes), r: 7, fill: '#4c78a8',
      'fill-opacity': 0.75, 'class': 'dot', 'data-plan': i});
    draw(dot, 'title', {}, p.line + ': ' + duration(p.seconds) + ', ' + size(p.bytes));
    dot.addEventListener('click', function () { choose(i); });
  });
}
function timeline(plan) {
  var row = 22, left = 76, top = 4, curve = 70, width = 1180;
  var svg = canvas('timeline', width, top + plan.ranks.length * row + curve + 44);
  var scale = (width - left - 12) / (plan.seconds || 1), detail = document.getElementById('span-detail');
  detail.textContent = 'Click a span.';
  var most = Math.max.apply(null, plan.ranks.map(function (r) {
    return Math.max.apply(null, r.held.map(function (h) { return h[1]; }).concat([1]));
  }));
  plan.ranks.forEach(function (rank, i) {
    var y = top + i * row, base = top + plan.ranks.length * row + 18;
    draw(svg, 'text', {x: 4, y: y + 15}, 'rank ' + rank.rank);
    rank.spans.forEach(function (s) {
      var span = draw(svg, 'rect', {x: left + s[0] * scale, y: y, width: Math.max(s[1] * scale, 0.4),
        height: row - 3, fill: data.kinds[s[2]] || '#bab0ac',
        'fill-opacity': 1 - 0.14 * (Math.max(s[4], 0) % 4),
        stroke: 'white', 'stroke-width': 0.4, 'class': 'span'});
      span.addEventListener('click', function () {
        var when = ': from ' + duration(s[0]) + ', ' + duration(s[1]) + ' long';
        detail.textContent = s[3] + ' on rank ' + rank.rank + when;
      });
    });
    var points = [], level = 0;
    rank.held.forEach(function (h) {
      points.push((left + h[0] * scale) + ',' + (base + curve * (1 - level / most)));
      level = h[1];
      points.push((left + h[0] * scale) + ',' + (base + curve * (1 - level / most)));
    });
    draw(svg, 'polyline', {points: points.join(' '), fill: 'none', 'class': 'held',
      stroke: 'hsl(' + (210 + 300 * i / plan.ranks.length) % 360 + ',60%,42%)'});
  });
  var at = top + plan.ranks.length * row;
  draw(svg, 'text', {x: 4, y: at + 28}, 'held');
  draw(svg, 'text', {x: 4, y: at + 44}, size(most));
  draw(svg, 'text', {x: left, y: at + curve + 36}, '0');
  draw(svg, 'text', {x: width - 12, y: at + curve + 36, 'text-anchor': 'end'}, plan.shown);
}
function memory(plan) {
  var row = 20, left = 76, width = 1180, svg = canvas('memory', width, 40 + plan.ranks.length * row);
  var near = plan.bytes > 0.2 * plan.limit;  // else the limit is far to the right of the picture
  var scale = (width - left - 12) / (Math.max(near ? plan.limit : 0, plan.bytes) * 1.04);
  var names = Object.keys(data.categories);
  names.forEach(function (name, i) {
    draw(svg, 'rect', {x: left + 120 * i, y: 8, width: 12, height: 12, fill: data.categories[name]});
    draw(svg, 'text', {x: left + 120 * i + 17, y: 18}, name);
  });
  plan.ranks.forEach(function (rank, i) {
    var x = left, y = 30 + i * row;
    draw(svg, 'text', {x: 4, y: y + 13}, 'rank ' + rank.rank);
    names.forEach(function (name) {
      var bytes = rank.peak[name] || 0;
      if (!bytes) return;
      var bar = draw(svg, 'rect', {x: x, y: y, width: bytes * scale, height: row - 5,
        fill: data.categories[name], 'class': 'bar'});
      draw(bar, 'title', {}, name + ': ' + size(bytes));
      x += bytes * scale;
    });
  });
  var limit = left + plan.limit * scale;
  if (near) draw(svg, 'line', {x1: limit, x2: limit, y1: 26, y2: 40 + plan.ranks.length * row,
    stroke: '#b3261e', 'stroke-dasharray': '5 4', id: 'limit'});
}
function mark(selector, index) {
  document.querySelectorAll(selector).forEach(function (element) {
    element.classList.toggle('chosen', element.dataset.plan === String(index));
  });
}
function choose(index) {
  var plan = plans[index], why = document.getElementById('why');
  document.getElementById('chosen-plan').textContent = plan.line;
  mark('#table tbody tr', index);
  mark('.dot', index);
  timeline(plan);
  memory(plan);
  why.textContent = '';
  plan.why.forEach(function (text) {
    var line = document.createElement('li');
    line.textContent = text;
    why.appendChild(line);
  });
}
var sorted = {column: -1, up: true};
function sort(column) {
  sorted = {column: column, up: sorted.column === column ? !sorted.up : true};
  var body = document.querySelector('#table tbody'), rows = Array.from(body.rows);
  function value(row) {
    var text = row.cells[column].dataset.value, number = Number(text);
    return isNaN(number) ? text : number;
  }
  rows.sort(function (a, b) {
    var x = value(a), y = value(b);
    return (x < y ? -1 : x > y ? 1 : 0) * (sorted.up ? 1 : -1);
  });
  rows.forEach(function (row) { body.appendChild(row); });
}
document.querySelectorAll('#table th').forEach(function (th) {
  th.addEventListener('click', function () { sort(Number(th.dataset.column)); });
});
document.querySelectorAll('#table tbody tr').forEach(function (row) {
  row.addEventListener('click', function () { choose(Number(row.dataset.plan)); });
});
scatter();
choose(0);
"""

// Makes elements, and changes what is on the page into what is wanted there.
//
// Rules of this file:
// * Text is text: nothing that came from outside is ever parsed as markup.
// * An element stays the same one as long as it means the same (its key), so that focus, selection and scrolling stay.

const SVG = "http://www.w3.org/2000/svg";

function make(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...flat(children));
  return element;
}

const flat = (children) => children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);

/** An element of HTML; `key` among the attributes tells it from its siblings. */
export const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);

/** An element of SVG. */
export const s = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

/** Text that somebody else chose: it can't turn the direction of what is around it. */
export const bdi = (text, attributes) => h("bdi", attributes, text);

/** Have `parent` hold just these children, by changing those that it has. */
export function fill(parent, ...children) {
  patchChildren(parent, flat(children).map((child) => (child instanceof Node ? child : document.createTextNode(child))));
}

const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("key") : null);

function patchChildren(parent, wanted) {
  const keyed = new Map();
  for (const child of parent.childNodes) if (keyOf(child) !== null) keyed.set(keyOf(child), child);
  let at = parent.firstChild;
  for (const want of wanted) {
    const key = keyOf(want);
    const have = key !== null ? keyed.get(key) : at !== null && keyOf(at) === null ? at : null;
    if (!have || have.nodeName !== want.nodeName) {
      parent.insertBefore(want, at);
      continue;
    }
    if (have === at) at = at.nextSibling;
    else parent.insertBefore(have, at);
    patch(have, want);
  }
  while (at !== null) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function patch(have, want) {
  if (have.nodeType === Node.TEXT_NODE) {
    if (have.nodeValue !== want.nodeValue) have.nodeValue = want.nodeValue;
    return;
  }
  for (const { name } of [...have.attributes]) if (!want.hasAttribute(name) && name !== "open") have.removeAttribute(name);
  for (const { name, value } of want.attributes) if (have.getAttribute(name) !== value) have.setAttribute(name, value);
  patchChildren(have, [...want.childNodes]);
}

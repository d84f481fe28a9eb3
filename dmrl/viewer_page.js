// A page of traces and nothing else.
'use strict';

const host = document.getElementById('page').appendChild(el('main', { class: 'viewer' }));
host.append(...heading('dmrl traces', data.name));
addViewer(host, document);

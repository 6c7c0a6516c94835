// Drives ImapFlow. Settings come as JSON on standard input; each check is printed as a line of JSON.
import fs from 'node:fs';
import net from 'node:net';
import { isDeepStrictEqual } from 'node:util';
import { once } from 'node:events';
import { ImapFlow } from 'imapflow';

const settings = JSON.parse(fs.readFileSync(0, 'utf8'));
const box = `Node ${settings.what}`;

function say(item) {
    const plain = (_, value) => (typeof value === 'bigint' ? Number(value) : value instanceof Set ? [...value] : value);
    process.stdout.write(JSON.stringify(item, plain) + '\n');
}

function check(what, good, detail) {
    say({
        check: what,
        good: Boolean(good),
        ...(good ? {} : { detail: JSON.stringify(detail ?? null, (_, v) => (typeof v === 'bigint' ? Number(v) : v)) })
    });
}

function same(what, got, expected) {
    check(what, isDeepStrictEqual(got, expected), { got, expected });
}

function connect(options = {}) {
    const client = new ImapFlow({
        host: settings.host,
        port: settings.port,
        secure: settings.secure,
        ...(settings.doSTARTTLS === undefined ? {} : { doSTARTTLS: settings.doSTARTTLS }),
        auth: { user: settings.user, pass: settings.password },
        logger: false,
        ...options
    });
    client.on('error', error => check('no error', false, error.message));
    return client;
}

// One message, as a mail transfer agent sends it.
async function deliver(subject) {
    const [host, port] = settings.lmtp.split(':');
    const socket = net.connect(Number(port), host);
    let text = '';
    socket.setEncoding('utf8');
    socket.on('data', data => (text += data));
    socket.write(`LHLO client.test\r\nMAIL FROM:<sender@sender.test>\r\nRCPT TO:<${settings.user}>\r\nDATA\r\n`);
    socket.write(`Subject: ${subject}\r\n\r\nHello\r\n.\r\nQUIT\r\n`);
    await once(socket, 'close');
    return text;
}

const wrong = connect({ auth: { user: settings.user, pass: 'wrong' } });
const refused = await wrong.connect().then(
    () => null,
    error => error
);
check('a wrong password is refused', refused?.authenticationFailed, refused?.message);

const client = connect();
await client.connect();
check(
    'capabilities',
    ['IDLE', 'UIDPLUS', 'MOVE', 'CONDSTORE', 'SPECIAL-USE', 'ID', 'NAMESPACE'].every(name =>
        client.capabilities.has(name)
    ),
    [...client.capabilities.keys()]
);
check('ID', client.serverInfo?.name === 'Posthaste', client.serverInfo);
same('the connection is secure', client.secureConnection, settings.secure || settings.doSTARTTLS !== false);

const created = await client.mailboxCreate([box, 'Entwürfe']);
same('mailboxCreate', [created.path, created.created], [`${box}/Entwürfe`, true]);
same('mailboxCreate of what is there', (await client.mailboxCreate(box)).created, false);
const list = await client.list({ statusQuery: { messages: true, unseen: true } });
same(
    'list',
    list
        .filter(item => item.path === 'INBOX' || item.path.startsWith(box))
        .map(item => [item.path, item.delimiter])
        .sort(),
    [
        ['INBOX', '/'],
        [box, '/'],
        [`${box}/Entwürfe`, '/']
    ]
);
same('list: the inbox is known', list.find(item => item.path === 'INBOX').specialUse, '\\Inbox');
same('list with status', list.find(item => item.path === box).status?.messages, 0);
await client.mailboxSubscribe(`${box}/Entwürfe`);
check('mailboxSubscribe', (await client.list()).find(item => item.path === `${box}/Entwürfe`).subscribed);

let lock = await client.getMailboxLock('INBOX');
try {
    const exists = client.mailbox.exists;
    check(
        'lock: the mailbox is selected',
        exists >= 30 && client.mailbox.uidNext > 30 && client.mailbox.highestModseq > 0n,
        client.mailbox
    );
    check('lock: flags are kept, new ones as well', client.mailbox.permanentFlags.has('\\*'), [
        ...client.mailbox.permanentFlags
    ]);

    const all = await client.fetchAll('1:*', {
        uid: true,
        flags: true,
        envelope: true,
        bodyStructure: true,
        size: true,
        internalDate: true,
        source: true
    });
    same('fetchAll', all.length, exists);
    check(
        'fetch: the size is that of the source',
        all.every(item => item.size === item.source.length),
        all.filter(item => item.size !== item.source.length).map(item => item.uid)
    );
    const third = all[3];
    same(
        'fetch: the envelope',
        [third.envelope.messageId, third.envelope.from[0].address],
        ['<3.1@clients.test>', 'sender3@sender.test']
    );
    same(
        'fetch: the structure',
        [third.bodyStructure.type, third.bodyStructure.childNodes.map(node => [node.part, node.type])],
        [
            'multipart/mixed',
            [
                ['1', 'text/plain'],
                ['2', 'application/octet-stream']
            ]
        ]
    );
    check('fetch: the decoded subject', all[1].envelope.subject.includes('grüßt'), all[1].envelope);
    const one = await client.fetchOne(
        String(third.uid),
        { bodyParts: ['1', '2', '2.mime'], headers: ['subject', 'date'] },
        { uid: true }
    );
    check(
        'fetchOne: parts and header fields',
        one.bodyParts.get('2').length > 10 &&
            /^Content-Type/i.test(one.bodyParts.get('2.mime').toString()) &&
            /^Subject: /im.test(one.headers.toString()),
        one
    );
    const { meta, content } = await client.download(String(third.uid), '2', { uid: true });
    let octets = 0;
    for await (const chunk of content) octets += chunk.length;
    same(
        'download of an attachment',
        [meta.contentType, meta.filename, octets > 10],
        ['application/octet-stream', 'data.bin', true]
    );

    same('messageFlagsAdd', await client.messageFlagsAdd({ uid: '1:3' }, ['\\Seen', '$Label1']), true);
    same('search by flags', await client.search({ seen: true, keyword: '$Label1' }, { uid: true }), [1, 2, 3]);
    same(
        'search by date and size',
        (await client.search({ since: new Date(Date.now() - 2 * 86400e3), larger: 1 }, { uid: true })).length,
        exists
    );
    const text = await client.search(
        { or: [{ from: 'sender17@' }, { header: { 'message-id': '<11.1@clients.test>' } }] },
        { uid: true }
    );
    same('search in text', text, [12, 18]);

    // A fetch is going on while the next command waits for it.
    const modseq = client.mailbox.highestModseq;
    await client.messageFlagsAdd({ uid: '5' }, ['\\Answered']);
    const changed = await client.fetchAll('1:*', { uid: true, flags: true }, { changedSince: modseq });
    same('fetch of what has changed', changed.map(item => item.uid).includes(5) && changed.length <= 4, true);
    await client.messageFlagsRemove({ uid: '1:5' }, ['\\Seen', '\\Answered', '$Label1']);
} finally {
    lock.release();
}

lock = await client.getMailboxLock('INBOX');
const before = client.mailbox.exists;
const told = once(client, 'exists', { signal: AbortSignal.timeout(15000) });
const idle = client.idle();
const reply = await deliver(`idle ${settings.what}`);
check('LMTP while it idles', reply.includes('250 2.0.0') || reply.split('\r\n').length > 5, reply);
const [event] = await told.catch(error => [{ error: error.message }]);
same('idle: it is told of a new message', [event.path, event.count], ['INBOX', before + 1]);
await client.noop();
await idle;
const newest = await client.fetchOne('*', { uid: true, envelope: true });
same('idle: the new message', newest.envelope.subject, `idle ${settings.what}`);

const other = connect();
await other.connect();
const otherLock = await other.getMailboxLock('INBOX');
const expunged = once(client, 'expunge', { signal: AbortSignal.timeout(15000) });
const idleAgain = client.idle();
const moved = await other.messageMove(String(newest.uid), box, { uid: true });
same('messageMove: its UID in the other mailbox', moved.uidMap && [...moved.uidMap.keys()], [newest.uid]);
const [gone] = await expunged.catch(error => [{ error: error.message }]);
same('idle: it is told of an expunged one', [gone.path, gone.seq], ['INBOX', before + 1]);
await client.noop();
await idleAgain;
const flags = once(client, 'flags', { signal: AbortSignal.timeout(15000) });
const idleOnce = client.idle();
await other.messageFlagsAdd('2', ['\\Flagged']);
const [flag] = await flags.catch(error => [{ error: error.message }]);
same('idle: it is told of flags', [flag.seq, flag.flags?.has('\\Flagged')], [2, true]);
await client.noop();
await idleOnce;
await other.messageFlagsRemove('2', ['\\Flagged']);
otherLock.release();
await other.logout();
lock.release();

const raw = Buffer.from('Subject: appended\r\nMessage-ID: <append@clients.test>\r\n\r\n' + 'line\r\n'.repeat(5000));
const appended = await client.append(box, raw, ['\\Seen', '$Sent'], new Date('2021-03-04T05:06:07Z'));
check('append answers with the UID', appended.uid > 0 && appended.uidValidity > 0n, appended);
lock = await client.getMailboxLock(box);
const copy = await client.fetchOne(
    String(appended.uid),
    { source: true, flags: true, internalDate: true },
    { uid: true }
);
same(
    'append keeps octets, flags and date',
    [copy.source.equals(raw), copy.flags.has('\\Seen') && copy.flags.has('$Sent'), copy.internalDate.toISOString()],
    [true, true, '2021-03-04T05:06:07.000Z']
);
const copied = await client.messageCopy(String(appended.uid), `${box}/Entwürfe`, { uid: true });
same('messageCopy', copied.destination, `${box}/Entwürfe`);
same('messageDelete', await client.messageDelete('1:*'), true);
same('all are gone', client.mailbox.exists, 0);
lock.release();
const status = await client.status(`${box}/Entwürfe`, {
    messages: true,
    uidNext: true,
    uidValidity: true,
    unseen: true,
    highestModseq: true
});
same('status', [status.messages, status.uidNext, status.unseen], [1, 2, 0]);
same('mailboxRename', (await client.mailboxRename(`${box}/Entwürfe`, `${box}/Neu`)).newPath, `${box}/Neu`);
await client.mailboxDelete(`${box}/Neu`);
await client.mailboxDelete(box);
check('mailboxDelete', !(await client.list()).some(item => item.path.startsWith(box)));
await client.logout();
say({ end: true });

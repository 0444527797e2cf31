// Figures as people read them. One unit each, and digits that stay in their place from second to second.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const money = new Intl.NumberFormat("en", { style: "currency", currency: "USD", maximumFractionDigits: 2 });
const cents = new Intl.NumberFormat("en", { style: "currency", currency: "USD", maximumSignificantDigits: 2 });

export const NONE = "–";

export const count = (value) => (value == null ? NONE : whole.format(value));

export const rate = (value) => (value == null ? NONE : (value < 99.95 ? tenth : whole).format(value));

// 99,999, then 100 k, 1.5 M
export function large(value) {
  if (value == null) return NONE;
  if (Math.abs(value) < 1e5) return whole.format(value);
  return value < 1e6 ? `${short.format(value / 1e3)} k` : value < 1e9 ? `${short.format(value / 1e6)} M` : `${short.format(value / 1e9)} G`;
}

export const dollars = (value) => (value && value < 0.1 ? cents : money).format(value);

export const share = (part) => (part == null ? NONE : `${short.format(100 * part)} %`);

export const timeOfDay = (epoch) => clock.format(new Date(epoch * 1000));

// 340 ms, 1.24 s, 12.4 s, 3 min 20 s, 2 h 5 min
export function seconds(value) {
  if (value == null) return NONE;
  if (value < 0.9995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 9.995) return `${value.toFixed(2)} s`;
  if (value < 99.95) return `${value.toFixed(1)} s`;
  return long(value);
}

// 85 s, 12 min, 5 h, 3 d
export function brief(value) {
  if (value == null) return NONE;
  if (value < 99.5) return `${Math.round(value)} s`;
  if (value < 5970) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} d`;
}

export function long(value) {
  const total = Math.round(value);
  if (total < 100) return `${total} s`;
  if (total < 3600) return `${Math.floor(total / 60)} min${total < 600 && total % 60 ? ` ${total % 60} s` : ""}`;
  const hours = Math.floor(total / 3600);
  if (hours < 48) return `${hours} h ${Math.floor((total % 3600) / 60)} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

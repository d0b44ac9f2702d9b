"""Usual names of things whose emoji have other names: "car" for "automobile"."""

from __future__ import annotations


# A line for each name, as in its label: the name and its synonyms, separated by commas.
TABLE = """
automobile: car
airplane: plane, aeroplane
bicycle: bike
motorcycle: motorbike
motor scooter: scooter
kick scooter: push scooter
bus: coach
ship: ocean liner
passenger ship: cruise ship
sailboat: sailing boat
speedboat: fast boat
locomotive: steam train, steam engine
delivery truck: truck, lorry
articulated lorry: semi truck
fire engine: fire truck
police car: cop car
taxi: cab
sport utility vehicle: suv
high-speed train: fast train
tram: streetcar
flying saucer: ufo
rocket: spaceship
hot beverage: coffee, cup of coffee
teacup without handle: green tea
beer mug: beer
wine glass: wine, glass of wine
cocktail glass: cocktail, martini
tropical drink: summer drink
glass of milk: milk
doughnut: donut
hamburger: burger
french fries: fries, chips
cheese wedge: cheese
hot pepper: chili, chili pepper
ear of corn: corn, maize
eggplant: aubergine
tangerine: orange fruit, mandarin
leafy green: lettuce
red apple: apple
cooking: fried egg
shallow pan of food: paella
meat on bone: meat
poultry leg: chicken leg, drumstick
cut of meat: steak
soft ice cream: soft serve
ice cream: bowl of ice cream
shortcake: slice of cake
birthday cake: cake
honey pot: honey
candy: sweet
custard: pudding
baguette bread: baguette
bread: loaf of bread, toast
steaming bowl: ramen, noodle soup
spaghetti: pasta
cooked rice: bowl of rice
pot of food: stew
green salad: salad
canned food: tin can
takeout box: takeaway box
fork and knife with plate: dinner plate
fork and knife: cutlery
kitchen knife: knife
kiwi fruit: kiwi
bottle with popping cork: champagne bottle, champagne
clinking beer mugs: cheers
cup with straw: soft drink
brown mushroom: champignon
mushroom: toadstool
dog face: dog head, puppy
cat face: cat head, kitty
cat: kitten
horse face: horse head
cow face: cow head
pig face: pig head
mouse face: mouse head
rabbit face: rabbit head, bunny
tiger face: tiger head
monkey face: monkey head
dragon face: dragon head
rabbit: hare
pig: hog
fox: fox face
lion: lion face
bear: bear face
panda: panda bear
koala: koala bear
frog: frog face
wolf: wolf face
raccoon: racoon
boar: wild pig
ram: male sheep
ewe: sheep
two-hump camel: bactrian camel
camel: dromedary
hippopotamus: hippo
rhinoceros: rhino
chipmunk: squirrel
paw prints: paws
baby chick: chick
front-facing baby chick: front-facing chick
hatching chick: chick in an egg
rooster: cock
chicken: hen
dove: pigeon
honeybee: bee
lady beetle: ladybug, ladybird
bug: caterpillar
cricket: grasshopper
spider web: cobweb
crocodile: alligator
turtle: tortoise
t-rex: dinosaur, tyrannosaurus
sauropod: long-necked dinosaur, brontosaurus
spouting whale: blue whale
orca: killer whale
blowfish: pufferfish
spiral shell: seashell, shell
microbe: germ, bacteria
bouquet: bunch of flowers
evergreen tree: pine tree, fir
deciduous tree: tree
four leaf clover: lucky clover
sheaf of rice: wheat
seedling: sprout
potted plant: houseplant
maple leaf: autumn leaf
fallen leaf: brown leaf
leaf fluttering in wind: leaf, green leaf
wilted flower: withered rose
blossom: flower, daisy
hot springs: onsen
house with garden: family home
house: home
office building: skyscraper
classical building: temple
desert island: tropical island
snow-capped mountain: snowy mountain
camping: campsite
tent: camping tent
ferris wheel: big wheel
roller coaster: rollercoaster
carousel horse: merry-go-round
horizontal traffic light: sideways traffic light
vertical traffic light: traffic light
police car light: siren
construction: roadworks barrier
ring buoy: lifebuoy, life ring
fuel pump: gas pump, petrol pump
bellhop bell: service bell
luggage: suitcase
hourglass done: hourglass
watch: wristwatch
mantelpiece clock: clock
sun: sunshine
crescent moon: moon
ringed planet: saturn, planet
high voltage: lightning, lightning bolt
droplet: water drop
water wave: wave, sea
fire: flame
snowman without snow: plain snowman
closed umbrella: folded umbrella
cyclone: whirlpool
globe showing europe-africa: earth, globe
milky way: galaxy
shooting star: falling star
glowing star: shining star
christmas tree: xmas tree
wrapped gift: present, gift
party popper: confetti popper
confetti ball: piñata ball
jack-o-lantern: pumpkin, halloween pumpkin
soccer ball: football
american football: gridiron ball
tennis: tennis ball
bullseye: dartboard, target
game die: dice
bowling: bowling ball
ping pong: table tennis
pool 8 ball: billiard ball
puzzle piece: jigsaw piece
video game: game controller, gamepad
teddy bear: stuffed bear
artist palette: paint palette
sports medal: medal
trophy: cup trophy
crystal ball: fortune ball
water pistol: toy gun
framed picture: framed painting
diving mask: snorkel
performing arts: theatre masks
yarn: ball of wool
glasses: spectacles
t-shirt: shirt, tee
necktie: tie
billed cap: cap, baseball cap
top hat: magician's hat
man's shoe: leather shoe
running shoe: sneaker
high-heeled shoe: high heel
woman's boot: boot
handbag: hand bag
backpack: school bag, rucksack
gem stone: diamond, gem
crown: king's crown
mobile phone: phone, smartphone
telephone: landline phone
laptop: notebook computer
desktop computer: computer, monitor
computer mouse: mouse for a computer
floppy disk: diskette
optical disk: compact disc
television: tv
light bulb: lamp, bulb
flashlight: torch
magnifying glass tilted left: magnifying glass
closed book: red book
open book: book
books: pile of books
envelope: letter
package: parcel, cardboard box
pencil: lead pencil
memo: note and pencil
wastebasket: trash can, bin
locked: padlock, lock
unlocked: open padlock
axe: hatchet
wrench: spanner
crossed swords: two swords
dagger: sword
bow and arrow: archery bow
carpentry saw: saw
gear: cogwheel
balance scale: scales
test tube: lab tube
syringe: needle
pill: capsule
adhesive bandage: plaster, band-aid
couch and lamp: sofa, couch
toilet: wc
bathtub: bath
lotion bottle: shampoo
roll of paper: toilet paper
shopping cart: shopping trolley
headstone: gravestone
moai: easter island head
speaker high volume: loud speaker
musical keyboard: piano
guitar: electric guitar
maracas: shakers
red heart: heart
broken heart: split heart
hundred points: hundred
collision: explosion, boom
zzz: snoring
pile of poo: poop
skull: death's head
alien monster: space invader
robot: robot face
face with tears of joy: laughing face, laughing emoji
smiling face with heart-eyes: face in love
smiling face with sunglasses: cool face
loudly crying face: sobbing face
sleeping face: asleep face
face blowing a kiss: kiss face
enraged face: furious face
exploding head: mind blown
thumbs up: like
thumbs down: dislike
folded hands: praying hands
clapping hands: applause
flexed biceps: strong arm, muscle
victory hand: peace sign
waving hand: hello
ok hand: okay hand
raised fist: fist
santa claus: santa, father christmas
police officer: cop
woman dancing: dancing woman
construction worker: builder
"""
SYNONYMS: dict[str, tuple[str, ...]] = {
    label: tuple(name.strip() for name in names.split(","))
    for label, _, names in (line.partition(": ") for line in TABLE.strip().splitlines())
}
